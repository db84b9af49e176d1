"""Made-up people with histories of the task `chat`: each has one topic and one manner of writing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.rig.tiny import WORLDS

WORDS = ("sea", "wind", "stone", "river", "bread", "letter", "garden", "winter", "music", "paper", "road", "window")
MANNERS = ("!", "...", " ok", " :)", " indeed", "?")


def people(count: int, items: int = 14) -> list[dict[str, Any]]:
    """Return people in LaMP's per-user layout; person i has `items` + i items and talks about `WORLDS[i]`."""
    return [
        {
            "user_id": f"secret-person-{i}",
            "profile": [
                {"id": f"{i}-{n}", "input": f"Say {n} on {WORLDS[i % len(WORLDS)]}", "output": f"{n}{MANNERS[i % 6]}"}
                for n in range(items + i)
            ],
            "query": [],
        }
        for i in range(count)
    ]


def write_people(path: Path, everybody: Sequence[object]) -> Path:
    """Write a file of people, as `mta bank build` and `mta users import` read it."""
    path.write_text(json.dumps(list(everybody)), "utf-8")
    return path
