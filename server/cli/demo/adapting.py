"""The last step of the demo: adapt to a person whose manner no anchor has, from a few samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from mta_client import Client, Job
from server.cli.demo.answers import DemoAnswer
from server.cli.demo.personas import QUESTIONS, everyday

USER = "kai"
GREETING = "gg friends,"
"""Opening of all texts of this person; nobody in the bank uses it."""

SAMPLES = 10
CONFIG: dict[str, Any] = {"rank": 2, "steps": 12, "learning_rate": 6e-3}

_BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Training:
    """A finished job."""

    job: Job  # its final state
    losses: list[float]  # training loss per step
    seconds: float  # from the request to the end of the job


def samples() -> list[dict[str, str]]:
    """Return the person's samples: everyday questions, answered in their manner."""
    return [{"input": question, "output": f"{GREETING} {plain.lower()}"} for question, plain in everyday()[:SAMPLES]]


def train(client: Client, user_id: str) -> Training:
    """Send the samples and wait for the end of the job."""
    sent_s = time.perf_counter()
    states = list(client.events(client.adapt(user_id, samples(), **CONFIG).id))
    losses = [loss for _, loss in states[-1].progress["loss"]]
    return Training(states[-1], losses, time.perf_counter() - sent_s)


def shows(text: str) -> bool:
    """Whether a text begins with the person's greeting."""
    return text.lstrip().startswith(GREETING)


def before_and_after(before: Sequence[DemoAnswer], after: Sequence[DemoAnswer]) -> Table:
    """Return a table of answers to the same questions before and after the training."""
    table = Table(
        box=box.ROUNDED,
        title=f"{USER} before and after {SAMPLES} samples that begin with “{GREETING}”",
        title_justify="left",
    )
    for title in ("Question", "Before", "After"):
        table.add_column(title, ratio=1 if title == "Question" else 2)
    for question, old, new in zip(QUESTIONS, before, after, strict=False):
        table.add_row(Text(question, style="bold"), _shown(old), _shown(new))
        table.add_section()
    return table


def outcome(training: Training) -> str:
    """Describe the outcome of the training in one line."""
    job = training.job
    before, after = (job.held_out[side] or 0.0 for side in ("before", "after"))
    return (
        f"{job.state} after {job.progress['steps']} steps in {training.seconds:.0f} s: loss on held-out samples "
        f"{before:.2f} → {after:.2f}"
    )


def loss_curve(losses: Sequence[float], width: int = 60, height: int = 5) -> list[str]:
    """Return the lines of a small plot of the training loss, with its range at the side."""
    if not losses:
        return []
    step = max(1, -(-len(losses) // width))
    points = [sum(part) / len(part) for part in (losses[i : i + step] for i in range(0, len(losses), step))]
    low, high = min(points), max(points)
    levels = [round((point - low) / (high - low or 1) * (8 * height - 1)) + 1 for point in points]
    lines = []
    for row in reversed(range(height)):
        bars = "".join(_BLOCKS[min(8, max(0, level - 8 * row))] for level in levels)
        label = f"{high:5.2f}" if row == height - 1 else f"{low:5.2f}" if row == 0 else " " * 5
        lines.append(f"{label} ┤{bars}")
    return lines


def _shown(answer: DemoAnswer) -> Text:
    text = Text(answer.text).append(" …" if answer.cut else "", "dim")
    return text.append(f"\n\n{answer.level}", "dim")
