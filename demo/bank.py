"""The demo's bank, cached under a hash of its inputs; `mta bank build` checks it, and resumes an interrupted build."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

BUILD_OPTIONS = (
    *("--task", "chat"),
    *("--history-share", "0"),  # past answers would add nothing to what an anchor's adapter has learnt
    *("--common-steps", "8"),  # few steps on the average of three manners leave more to the anchors
    *("--steps", "16"),
    *("--learning-rate", "8e-3"),  # few steps, large ones: manners are easily learned
    "--force",  # a bank of another base model is replaced
)


def cached_bank(people: Sequence[dict[str, object]], cache: Path, mta: Callable[..., None]) -> Path:
    """Return the bank of these anchors, in LaMP's per-user layout; build it if it is missing or out of date.

    `mta` runs a command. A concurrent call waits for the first, and uses its bank.
    """
    text = json.dumps(people, indent=1, ensure_ascii=False)
    key = hashlib.sha256("\0".join((text, *BUILD_OPTIONS)).encode()).hexdigest()[:16]
    kept = cache / "demo" / key
    kept.mkdir(parents=True, exist_ok=True)
    users, bank = kept / "anchors.json", kept / "bank"
    with (kept / ".lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        users.write_text(text, encoding="utf-8")
        files = ("--users", str(users), "--out", str(bank))
        mta("bank", "build", *files, "--anchors", str(len(people)), *BUILD_OPTIONS)
    return bank
