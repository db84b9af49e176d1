"""What `mta bank info` shows of a bank; and its verdict in words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bank.lookup.index import AnchorIndex
from bank.manifest import INDEX_FILE, MANIFEST_FILE, read_manifest, verify_files
from bank.rules import LossDifference, Verdict


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
        "weights": manifest.weights.model_dump(),
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


def in_words(verdict: Verdict) -> str:
    """A judgement, and the figures behind it, each a sentence."""
    sentences = [
        f"{_judgement(verdict)} Measured on {verdict.people} people left out of the bank, for a typical one of them, "
        f"nats a token, below 0 is better: the bank's adapters {_figure(verdict.merged)} against what all users share",
        f"{_items(verdict)} in the prompt {_figure(verdict.both)} on top of that, "
        f"{_figure(verdict.recalled)} without the adapters",
        f"the adapters {_figure(verdict.beyond)} beside {_items(verdict)}",
    ]
    if verdict.prior:
        sentences.append(f"the adapters {_figure(verdict.prior)} against the histogram of a person's own answers")
    history = f"Prompts get {_items(verdict)} by default." if verdict.history else ""
    return f"{'; '.join(sentences)}. {history}".rstrip()


def _judgement(verdict: Verdict) -> str:
    if verdict.prior and verdict.prior.higher:
        return "Not worth serving: the histogram of a person's own answers, without any model, predicts them better."
    if verdict.history and not verdict.beyond.lower:
        return f"Worth serving with {_items(verdict)} in the prompt; beside that the anchors add nothing sure."
    if verdict.merged.lower or verdict.beyond.lower:
        return "Worth serving."
    if verdict.merged.higher:
        return "Not worth serving: what all users share does better alone."
    return "Not shown to be worth serving: its gain is within chance."


def _items(verdict: Verdict) -> str:
    """How many past items the figures are about."""
    return f"{verdict.history} past items" if verdict.history > 1 else "one past item"


def _figure(difference: LossDifference) -> str:
    return f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
