"""The demo's bank, kept in the cache folder under a hash of what it is made from, where every checkout finds it.

`mta bank build` itself knows whether a bank is up to date, and continues where it was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from bank.models.folders import locked
from deploy.demo.children import run_mta
from server.settings import Settings

BUILD_OPTIONS = (
    *("--task", "chat"),
    *("--history-share", "0"),  # what past answers would show, a manner's own adapter has learnt already
    *("--common-steps", "8"),  # an average of three manners: the less of it, the more is left to the anchors
    *("--steps", "16"),
    *("--learning-rate", "8e-3"),  # few steps, large ones: manners are easily learned
    "--force",  # a bank of another base model is replaced
)


def build_bank(people: Sequence[dict[str, object]]) -> Path:
    """The bank of these people; trained if it is missing or out of date.

    A second call at the same time waits for the first, and then finds the bank.

    Args:
        people: all the anchors, in LaMP's per-user layout.

    Raises:
        DemoError: when the bank cannot be built.
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
