"""Read PEFT adapters, folding the scaling into B, and make them, with profiles, the anchors of a bank."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from adapters.errors import excerpt
from adapters.flat import flattened
from adapters.lora import ModuleShape, RowLayout
from adapters.recipe import FusionMethod
from bank.building.assemble import Anchors, BankRows, Basis, Rules, bank_rank, write_bank
from bank.building.options import ImportOptions
from bank.building.selection import person_embedding
from bank.errors import BankError
from bank.items.histories import read_histories
from bank.items.tasks import get_task
from bank.lookup.embedder import Embedder
from bank.manifest import BankManifest, EmbedderId, WeightRule
from bank.models.folders import base_model_id
from bank.peft.exported import CONFIG_FILE, PREFIX, WEIGHTS_FILE

# PEFT settings that change ΔW = scaling · B A, each with the value at which it has no effect.
_PLAIN = {
    "bias": "none",
    "use_dora": False,
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
    "layer_replication": None,
}
# PEFT's initialisations that take the first B A away from the base model, so that the adapter belongs to another base.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class PeftAdapter:
    """A LoRA from a PEFT folder, named after it, in float32 with B scaled. Ranks may differ between modules."""

    name: str
    a: dict[str, torch.Tensor]
    b: dict[str, torch.Tensor]

    @property
    def rank(self) -> int:
        return max(a.shape[0] for a in self.a.values())

    def row(self, layout: RowLayout) -> torch.Tensor:
        """Return the same ΔW as a row [D], zero-padded to the layout's rank and to all its modules."""
        a = {module.name: torch.zeros(layout.rank, module.h_in) for module in layout.modules}
        b = {module.name: torch.zeros(module.h_out, layout.rank) for module in layout.modules}
        for name, own in self.a.items():
            a[name][: own.shape[0]] = own
            b[name][:, : own.shape[0]] = self.b[name]
        return torch.cat([flattened(layout, a), flattened(layout, b)])


def import_bank(
    adapters: Sequence[Path],
    profiles: Path,
    out: Path,
    options: ImportOptions,
    *,
    model_folder: Path,
    base_model: str,
    embedder: Embedder,
) -> BankManifest:
    """Make a bank from PEFT folders, in anchor order, and the profiles that have a folder's name as `user_id`."""
    task = get_task(options.task)
    read = [read_peft(folder) for folder in adapters]
    names = [adapter.name for adapter in read]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise BankError(f"adapter folders must have distinct names; these repeat: {excerpt(repeated)}")
    known = {person.user_id: person for person in read_histories(profiles, task)}
    if missing := [name for name in names if name not in known]:
        raise BankError(f"{profiles} has no profile for {excerpt(missing)}: user_id must be the adapter folder's name")
    people = [known[name] for name in names]
    rank = max(adapter.rank for adapter in read)
    layout = RowLayout(_common_modules(read, model_folder), rank, shared_a=False)
    rule = WeightRule(anchors=min(options.k, len(read)))
    bank_rank(FusionMethod.CAT, layout.rank, rule, False, options.user_rank)
    return write_bank(
        out,
        Basis(
            task.name,
            base_model_id(base_model, model_folder),
            EmbedderId(id=embedder.id, dim=embedder.dim),
            options.user_rank,
        ),
        BankRows(layout, [adapter.row(layout) for adapter in read], shared_a=None, common=False),
        Anchors(
            np.stack([person_embedding(person, task, embedder) for person in people]),
            [len(person.items) for person in people],
        ),
        Rules(rule),
        training={"imported": True},
    )


def _common_modules(read: Sequence[PeftAdapter], model_folder: Path) -> tuple[ModuleShape, ...]:
    """Return all modules of all adapters, in layer order; BankError if a shape differs from the base model's."""
    shapes = linear_shapes(model_folder)
    names = {name for adapter in read for name in adapter.a}
    for adapter in read:
        for name, a in adapter.a.items():
            shape = (adapter.b[name].shape[0], a.shape[1])
            if shapes.get(name) != shape:
                raise BankError(
                    f"adapter {adapter.name} does not fit the base model: {name} is {shape} there, "
                    f"{shapes.get(name, 'absent')} in {model_folder}"
                )
    return tuple(ModuleShape(name, shapes[name][1], shapes[name][0]) for name in sorted(names, key=_natural))


def linear_shapes(model_folder: Path) -> dict[str, tuple[int, int]]:
    """Return (H_out, H_in) by module name for all matrices in the base model's safetensors; read only their headers."""
    from safetensors import SafetensorError, safe_open

    shapes = {}
    try:
        for path in sorted(model_folder.glob("*.safetensors")):
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 - the handle is not a mapping
                    shape = file.get_slice(key).get_shape()
                    if key.endswith(".weight") and len(shape) == 2:
                        shapes[key.removesuffix(".weight")] = (shape[0], shape[1])
    except (OSError, SafetensorError) as error:
        raise BankError(f"cannot read the base model at {model_folder}: {error}") from error
    if not shapes:
        raise BankError(f"the base model at {model_folder} has no *.safetensors to check adapters against")
    return shapes


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_peft(folder: Path) -> PeftAdapter:
    """Read a plain PEFT LoRA, optionally with rank and alpha patterns and rsLoRA scaling; BankError for other kinds."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = dict(json.loads((folder / CONFIG_FILE).read_text("utf-8")))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise BankError(f"no PEFT adapter at {folder}: {error}") from error
    if config.get("peft_type") != "LORA":
        raise BankError(f"{folder} holds a PEFT adapter of type {excerpt(config.get('peft_type'))}, not a LoRA")
    for key, plain in _PLAIN.items():
        if config.get(key) not in (plain, None, False):
            raise BankError(f"{folder}: {key} = {excerpt(config[key])} is not supported: a bank holds plain LoRAs only")
    if (begun := str(config.get("init_lora_weights"))).startswith(_CHANGE_THE_BASE):
        raise BankError(
            f"{folder}: init_lora_weights = {excerpt(begun)} has changed the base model: convert the adapter "
            "with PEFT's `path_initial_model_for_weight_conversion`"
        )
    matrices: dict[str, dict[str, torch.Tensor]] = {"lora_A": {}, "lora_B": {}}
    for key, value in tensors.items():
        name, _, part = key.removeprefix(PREFIX).removesuffix(".weight").rpartition(".")
        if not key.startswith(PREFIX) or part not in matrices or value.ndim != 2:
            raise BankError(f"{folder}: {excerpt(key)} is not a LoRA of a linear layer: a bank cannot hold it")
        matrices[part][name] = value.float()
    a, b = matrices.values()
    if not a or a.keys() != b.keys():
        unpaired = sorted(a.keys() ^ b.keys())
        raise BankError(f"{folder}: every module needs one A and one B; these do not have both: {excerpt(unpaired)}")
    for name in a:
        if a[name].shape[0] != b[name].shape[1]:
            raise BankError(f"{folder}: {name} has A of rank {a[name].shape[0]} and B of rank {b[name].shape[1]}")
        b[name] = b[name] * _scaling(folder, config, name, a[name].shape[0])
        if not (a[name].isfinite().all() and b[name].isfinite().all()):
            raise BankError(f"{folder}: {name} holds numbers that are not finite: its training diverged")
    return PeftAdapter(folder.resolve().name, a, b)


def _scaling(folder: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return alpha / R, or alpha / √R if the adapter is rank-stabilised, by PEFT's own pattern rules."""
    from peft.utils.other import get_pattern_key

    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    declared = ranks.get(get_pattern_key(ranks.keys(), module), config.get("r"))
    if declared != rank:
        raise BankError(f"{folder}: {module} has rank {rank}, but its configuration says {excerpt(declared)}")
    alpha = alphas.get(get_pattern_key(alphas.keys(), module), config.get("lora_alpha"))
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise BankError(f"{folder}: lora_alpha must be a number, got {excerpt(alpha)}")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
