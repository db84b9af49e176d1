"""Open a bank's rows for fusion; separate from the manifest because this needs torch, which gateways do not install."""

from __future__ import annotations

from pathlib import Path

from adapters.errors import FusionError
from adapters.matrix import MetaMatrix
from bank.errors import BankError
from bank.manifest import MATRIX_FILE, BankManifest, verify_files


def open_matrix(folder: Path, manifest: BankManifest) -> MetaMatrix:
    """Map a bank's meta-LoRA matrix; BankError if it is missing or damaged, or its shape differs from the manifest."""
    verify_files(folder, manifest, (MATRIX_FILE,))
    try:
        return MetaMatrix.open(folder / MATRIX_FILE, manifest.layout, len(manifest.anchors), manifest.common)
    except FusionError as error:
        raise BankError(str(error)) from error
