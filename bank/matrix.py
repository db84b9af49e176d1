"""A bank's rows, opened for fusing; apart from the manifest because they need torch, which a gateway does not have."""

from __future__ import annotations

from pathlib import Path

from adapters.errors import FusionError
from adapters.matrix import MetaMatrix
from bank.errors import BankError
from bank.manifest import MATRIX_FILE, BankManifest, verify_files


def open_matrix(folder: Path, manifest: BankManifest) -> MetaMatrix:
    """Check the meta-LoRA matrix of a bank against its checksum, and map it.

    Raises:
        BankError: when the file is missing or damaged, or its shape is not the manifest's.
    """
    verify_files(folder, manifest, (MATRIX_FILE,))
    try:
        return MetaMatrix.open(folder / MATRIX_FILE, manifest.layout, len(manifest.anchors), manifest.common)
    except FusionError as error:
        raise BankError(str(error)) from error
