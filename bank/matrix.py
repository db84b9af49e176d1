"""Open a bank's rows for fusion; separate from the manifest because this needs torch, which gateways do not install."""

from __future__ import annotations

from pathlib import Path

from adapters.errors import FusionError
from adapters.matrix import MetaMatrix
from bank.errors import BankError
from bank.manifest import MATRIX_FILE, BankManifest, verify_files


def open_matrix(folder: Path, manifest: BankManifest, file: str = MATRIX_FILE) -> MetaMatrix:
    """Map a bank's meta-LoRA matrix; BankError if it is missing or damaged, or its shape differs from the manifest."""
    verify_files(folder, manifest, (file,))
    try:
        return MetaMatrix.open(folder / file, manifest.layout, manifest.personal_rows, manifest.common)
    except FusionError as error:
        raise BankError(str(error)) from error


def open_anchor_rows(folder: Path, manifest: BankManifest) -> MetaMatrix:
    """Map the matrix whose rows are the anchors' own, for a bank of directions too; BankError as for `open_matrix`."""
    people = manifest.model_copy(update={"directions": None})
    return open_matrix(folder, people, manifest.anchor_rows_file)
