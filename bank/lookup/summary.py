"""What `mta bank info` shows of a bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bank.lookup.index import AnchorIndex
from bank.lookup.verdict import in_words
from bank.manifest import INDEX_FILE, MANIFEST_FILE, read_manifest, verify_files


def summarise(folder: Path) -> dict[str, Any]:
    """Everything worth knowing about a bank, as plain JSON values; the files' checksums are checked.

    Raises:
        BankError: when the bank is missing or damaged.
    """
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    index = AnchorIndex.load(folder / INDEX_FILE)
    row_bytes = 2 * manifest.layout.row_numbers
    return {
        "folder": str(folder),
        "fingerprint": manifest.fingerprint,
        "task": manifest.task,
        "base_model": manifest.base_model.model_dump(),
        "embedder": manifest.embedder.model_dump(),
        "anchors": [entry.model_dump() for entry in manifest.anchors],
        "method": manifest.method.value,
        "common": manifest.common,
        "weights": {"source": manifest.weights.source, **manifest.weights.model_dump()},
        "index": {"kind": index.kind, "anchors": index.anchors, "dim": index.dim},
        "target_modules": list(manifest.target_modules),
        "modules": len(manifest.modules),
        "rank": manifest.rank,
        "fused_rank": manifest.fused_rank,
        "serving_rank": manifest.serving_rank,
        "user_rank": manifest.user_rank,
        "room": manifest.room,
        "row_bytes": row_bytes,
        "bytes": {name: (folder / name).stat().st_size for name in (*manifest.files, MANIFEST_FILE)},
        "training": manifest.training,
        "verdict": manifest.verdict.model_dump() if manifest.verdict else None,
        "in_words": in_words(manifest.verdict) if manifest.verdict else "What it gains was not measured.",
    }
