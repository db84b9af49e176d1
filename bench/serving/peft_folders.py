"""PEFT folders of a bank's recipes, one per user, for vLLM's own LoRA path."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from peft import LoraConfig
from rich.progress import Progress
from safetensors.torch import save_file

from adapters.fusion import fuse
from adapters.lora import LoraWeights
from bank.matrix import open_matrix
from bank.peft.exported import PREFIX, WEIGHTS_FILE
from bench.rig.engine import Engine
from bench.rig.subject import Subject

DISTINCT_FOLDERS = 16
"""Number of folders with their own files; the other folders have hard links to these."""


def peft_folders(subject: Subject, folder: Path, count: int) -> list[Path]:
    """Write `count` folders, each with a recipe's merged adapter."""
    matrix = open_matrix(subject.bank, subject.manifest)
    made: list[Path] = []
    for number, recipe in enumerate(itertools.islice(subject.recipes(), count)):
        here = folder / f"user-{number}"
        if number < DISTINCT_FOLDERS:
            write_peft(here, fuse(matrix, recipe), subject.manifest.base_model.name)
        else:
            here.mkdir()
            for file in made[number % DISTINCT_FOLDERS].iterdir():
                (here / file.name).hardlink_to(file)
        made.append(here)
    return made


def write_peft(folder: Path, lora: LoraWeights, base_model: str) -> None:
    """Write a merged adapter as a PEFT folder; alpha equals the rank, since B includes the scaling."""
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.rank,
        target_modules=sorted(lora.a),
        base_model_name_or_path=base_model,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    tensors = {f"{PREFIX}{name}.lora_A.weight": value.contiguous() for name, value in lora.a.items()}
    tensors |= {f"{PREFIX}{name}.lora_B.weight": value.contiguous() for name, value in lora.b.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config.save_pretrained(folder)


def load_folders(stock: Engine, folders: Sequence[Path], progress: Progress) -> None:
    """Let a stock vLLM load every folder under its name."""
    for folder in progress.track(folders, description="vLLM loads the folders"):
        body = {"lora_name": folder.name, "lora_path": str(folder)}
        stock.client.post("/v1/load_lora_adapter", json=body).raise_for_status()
