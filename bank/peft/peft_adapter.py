"""PEFT adapter folders, read with their scaling folded into B."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adapters.errors import excerpt
from adapters.lora import LoraWeights
from bank.errors import BankError
from bank.peft.exported import CONFIG_FILE, PREFIX, WEIGHTS_FILE

# Settings that make a PEFT LoRA more than ΔW = scaling · B A, with the value at which they do not.
_PLAIN = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "use_qalora": False,
}


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """A LoRA as PEFT saved it, by the folder's name; float32, scaling folded. Ranks may differ between modules."""

    name: str
    a: dict[str, torch.Tensor]
    b: dict[str, torch.Tensor]

    @property
    def rank(self) -> int:
        """The largest rank of its modules."""
        return max(a.shape[0] for a in self.a.values())

    def padded(self, modules: Mapping[str, tuple[int, int]], rank: int) -> LoraWeights:
        """The same ΔW padded with zeros, to at least its own rank, over modules (H_in, H_out), its own among them."""
        a = {name: torch.zeros(rank, h_in) for name, (h_in, _) in modules.items()}
        b = {name: torch.zeros(h_out, rank) for name, (_, h_out) in modules.items()}
        for name, own in self.a.items():
            a[name][: own.shape[0]] = own
            b[name][:, : own.shape[0]] = self.b[name]
        return LoraWeights(rank, a, b)


def read_peft(folder: Path) -> PeftAdapter:
    """Read a PEFT LoRA: rank, alpha, their patterns and rank-stabilised scaling; BankError for what is more or less."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise BankError(f"no PEFT adapter at {folder}: {error}") from error
    if config.get("peft_type") != "LORA":
        raise BankError(f"{folder} holds a PEFT adapter of type {excerpt(config.get('peft_type'))}, not a LoRA")
    for key, plain in _PLAIN.items():
        if config.get(key) not in (plain, None, False):
            raise BankError(f"{folder}: {key} = {excerpt(config[key])} is more than a LoRA: a bank cannot hold it")
    a, b = _matrices(folder, tensors)
    for name in a:
        if a[name].shape[0] != b[name].shape[1]:
            raise BankError(f"{folder}: {name} has A of rank {a[name].shape[0]} and B of rank {b[name].shape[1]}")
        b[name] = b[name] * _scaling(folder, config, name, a[name].shape[0])
        if not (a[name].isfinite().all() and b[name].isfinite().all()):
            raise BankError(f"{folder}: {name} holds numbers that are not finite: its training went wrong")
    return PeftAdapter(folder.resolve().name, a, b)


def _matrices(
    folder: Path, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {"lora_A": {}, "lora_B": {}}
    for key, value in tensors.items():
        name, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not key.startswith(PREFIX) or part not in found or value.ndim != 2:
            raise BankError(f"{folder}: {excerpt(key)} is not a LoRA of a linear layer: a bank cannot hold it")
        found[part][name] = value.float()
    if not found["lora_A"] or found["lora_A"].keys() != found["lora_B"].keys():
        unpaired = sorted(found["lora_A"].keys() ^ found["lora_B"].keys())
        raise BankError(f"{folder}: every module needs one A and one B; these do not have both: {excerpt(unpaired)}")
    return found["lora_A"], found["lora_B"]


def _scaling(folder: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / R, or alpha / √R where the adapter is rank-stabilised, by PEFT's own pattern rules."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    declared = ranks.get(get_pattern_key(ranks.keys(), module), config.get("r"))
    if declared != rank:
        raise BankError(f"{folder}: {module} has rank {rank}, but its configuration says {excerpt(declared)}")
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise BankError(f"{folder}: lora_alpha must be a number, got {excerpt(alpha)}")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
