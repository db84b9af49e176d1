"""Open a bank's rows for fusion; separate from the manifest because this needs torch, which gateways do not install."""

from __future__ import annotations

from pathlib import Path

from adapters.errors import FusionError
from adapters.matrix import MetaMatrix
from bank.errors import BankError
from bank.manifest import MATRIX_FILE, BankManifest, verify_files


def open_matrix(folder: Path, manifest: BankManifest) -> MetaMatrix:
    """Map a bank's meta-LoRA matrix; BankError if it is missing or damaged, or its shape differs from the manifest."""
    return _open(folder, manifest, MATRIX_FILE, manifest.personal_rows)


def open_anchor_rows(folder: Path, manifest: BankManifest) -> MetaMatrix:
    """Map the matrix whose rows are the anchors' own, for a bank of directions too; BankError as for `open_matrix`."""
    return _open(folder, manifest, manifest.anchor_rows_file, len(manifest.anchors))


def _open(folder: Path, manifest: BankManifest, file: str, rows: int) -> MetaMatrix:
    verify_files(folder, manifest, (file,))
    try:
        return MetaMatrix.open(folder / file, manifest.layout, rows, manifest.common)
    except FusionError as error:
        raise BankError(str(error)) from error
