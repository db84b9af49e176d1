"""Open a bank's rows for fusion; separate from the manifest because this needs torch, which gateways do not install."""

from __future__ import annotations

from pathlib import Path

import torch

from adapters.errors import FusionError
from adapters.fusion import fuse
from adapters.matrix import MetaMatrix
from adapters.training.forward.shared_part import SharedPart
from bank.errors import BankError
from bank.manifest import MATRIX_FILE, BankManifest, verify_files


def open_matrix(folder: Path, manifest: BankManifest, file: str = MATRIX_FILE) -> MetaMatrix:
    """Map a bank's meta-LoRA matrix; BankError if it is missing or damaged, or its shape differs from the manifest."""
    verify_files(folder, manifest, (file,))
    try:
        return MetaMatrix.open(folder / file, manifest.layout, manifest.personal_rows, manifest.common)
    except FusionError as error:
        raise BankError(str(error)) from error


def shared_part(matrix: MetaMatrix, manifest: BankManifest) -> SharedPart | None:
    """Return what reads the tokens before the bank's personal part acts; None if it acts everywhere."""
    if not manifest.shares_prompts:
        return None
    return SharedPart(manifest.acts, fuse(matrix, manifest.common_recipe, torch.float32))


def open_anchor_rows(folder: Path, manifest: BankManifest) -> MetaMatrix:
    """Map the matrix whose rows are the anchors' own, for a bank of directions too; BankError as for `open_matrix`."""
    people = manifest.model_copy(update={"directions": None})
    return open_matrix(folder, people, manifest.anchor_rows_file)
