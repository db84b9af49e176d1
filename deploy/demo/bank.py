"""The demo's bank. `mta bank build` itself knows whether a bank is what its inputs would make, and goes on where it
was interrupted; here is only what it is given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from deploy.demo.children import run_mta

OUT = Path(__file__).resolve().parents[2] / "out" / "demo"

BUILD_OPTIONS = (
    *("--task", "chat"),
    *("--method", "shared"),
    "--no-common",  # an average of three manners would help none of them
    *("--steps", "20"),
    *("--learning-rate", "8e-3"),  # few steps, large ones: manners are easily learned
    "--force",  # a bank of former people or options is replaced
)


def build_bank(people: Sequence[dict[str, object]], out: Path = OUT) -> Path:
    """The bank of these people; trained when it is not there yet, or no longer what they would make.

    Args:
        people: the anchors, all of them, in LaMP's per-user layout.
        out: the folder that bank and histories are kept in.

    Raises:
        DemoError: when the bank cannot be built.
    """
    out.mkdir(parents=True, exist_ok=True)
    users, bank = out / "anchors.json", out / "bank"
    users.write_text(json.dumps(people, indent=1, ensure_ascii=False), encoding="utf-8")
    files = ("--users", str(users), "--out", str(bank))
    run_mta("bank", "build", *files, "--anchors", str(len(people)), *BUILD_OPTIONS)
    return bank
