"""The facts that `mta bank info` shows, and a bank's verdict as text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bank.lookup.index import AnchorIndex
from bank.manifest import INDEX_FILE, MANIFEST_FILE, LossDifference, Verdict, read_manifest, verify_files


def summarise(folder: Path) -> dict[str, Any]:
    """Return the facts about a bank as plain JSON values, after checking its files' checksums."""
    manifest = read_manifest(folder)
    verify_files(folder, manifest)
    index = AnchorIndex.load(folder / INDEX_FILE)
    files = [name for name in (*manifest.files, MANIFEST_FILE) if (folder / name).exists()]
    return {
        "folder": str(folder),
        **manifest.model_dump(mode="json", exclude={"format", "files", "modules", "prior", "canary"}),
        "index": {"kind": index.kind, "anchors": index.anchor_count, "dim": index.dim},
        "modules": len(manifest.modules),
        "acts": manifest.acts,
        "words_default": manifest.words_default,
        "fused_rank": manifest.fused_rank,
        "room": manifest.room,
        "row_bytes": 2 * manifest.layout.row_numbers,
        "bytes": {name: (folder / name).stat().st_size for name in files},
        "in_words": verdict_text(manifest.verdict) if manifest.verdict else "The bank's gain was not measured.",
    }


def verdict_text(verdict: Verdict) -> str:
    sentences = [
        f"{_judgement(verdict)} Measured on {verdict.people} people left out of the bank, typical loss differences in "
        f"nats per token, negative is better: adapters against the common row {_figure(verdict.merged)}",
        f"{_items(verdict)} in the prompt, with adapters {_figure(verdict.both)}, without {_figure(verdict.recalled)}",
        f"adapters against the common row, both with {_items(verdict)} {_figure(verdict.beyond)}",
    ]
    if verdict.prior:
        sentences.append(f"adapters against the histogram of a person's own answers {_figure(verdict.prior)}")
    if verdict.words:
        sentences.append(f"with a person's own phrases {_figure(verdict.words)}")
    history = f"Prompts get {_items(verdict)} by default." if verdict.history else ""
    return f"{'; '.join(sentences)}. {history}".rstrip()


def _judgement(verdict: Verdict) -> str:
    if verdict.prior and verdict.prior.is_higher:
        return "Not worth serving: the histogram of a person's own answers predicts better, without any model."
    if verdict.history and not verdict.beyond.is_lower:
        return f"Worth serving with {_items(verdict)} in the prompt; the anchors add no significant gain to that."
    if verdict.merged.is_lower or verdict.beyond.is_lower:
        return "Worth serving."
    if verdict.merged.is_higher:
        return "Not worth serving: the common row alone is better."
    return "Not shown to be worth serving: its gain is not significant."


def _items(verdict: Verdict) -> str:
    return f"{verdict.history} past items" if verdict.history > 1 else "one past item"


def _figure(difference: LossDifference) -> str:
    return f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
