"""The demo's bank, cached under a hash of its inputs; `mta bank build` checks it, and resumes an interrupted build."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from bank.models.folders import locked
from server.cli.demo.server import run_mta
from server.settings import Settings

BUILD_OPTIONS = (
    *("--task", "chat"),
    *("--history-share", "0"),  # past answers would add nothing to what an anchor's adapter has learnt
    *("--common-steps", "8"),  # few steps on the average of three manners leave more to the anchors
    *("--steps", "16"),
    *("--learning-rate", "8e-3"),  # few steps, large ones: manners are easily learned
    "--force",  # a bank of another base model is replaced
)


def build_bank(people: Sequence[dict[str, object]]) -> Path:
    """Return the bank of these anchors, in LaMP's per-user layout; train it if it is missing or out of date.

    A concurrent call waits for the first, and then finds the bank. DemoError if it cannot be built.
    """
    text = json.dumps(people, indent=1, ensure_ascii=False)
    key = hashlib.sha256("\0".join((text, *BUILD_OPTIONS)).encode()).hexdigest()[:16]
    kept = Settings().cache_dir / "demo" / key
    kept.mkdir(parents=True, exist_ok=True)
    users, bank = kept / "anchors.json", kept / "bank"
    with locked(kept / ".lock"):
        users.write_text(text, encoding="utf-8")
        files = ("--users", str(users), "--out", str(bank))
        run_mta("bank", "build", *files, "--anchors", str(len(people)), *BUILD_OPTIONS)
    return bank
