"""The last step of the demo: adapt to a person whose manner no anchor has, from a few samples."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Column, Table
from rich.text import Text

from demo.answers import DemoAnswer
from demo.manners import NIGHT_OWL
from demo.personas import QUESTIONS, worlds
from mta_client import Client, Job

USER = "kai"
GREETING = "gg friends,"  # opens all texts of this person; nobody in the bank uses it
SAMPLES = 10
CONFIG: dict[str, Any] = {"rank": 4, "steps": 32, "learning_rate": 1e-3}  # higher rates make loops of the greeting
_BLOCKS = " ▁▂▃▄▅▆▇█"
_HEIGHT = 5  # lines of the plot of losses


def samples() -> list[dict[str, str]]:
    everyday = worlds()["everyday"][:SAMPLES]
    return [{"input": question, "output": f"{GREETING} {NIGHT_OWL.write(plain, USER)}"} for question, plain in everyday]


def train(client: Client, user_id: str) -> tuple[Job, float]:
    """Send the samples, and return the job at its end with the seconds that it took."""
    sent_s = time.perf_counter()
    states = list(client.events(client.adapt(user_id, samples(), **CONFIG).id))
    return states[-1], time.perf_counter() - sent_s


def shows(text: str) -> bool:
    return text.lstrip().startswith(GREETING) and text.count("gg") == 1  # says it once, not in a loop


def before_and_after(before: Sequence[DemoAnswer], after: Sequence[DemoAnswer]) -> Table:
    columns = (Column("Question", ratio=1), Column("Before", ratio=2), Column("After", ratio=2))
    title = f"{USER} before and after {SAMPLES} samples that begin with “{GREETING}”"
    table = Table(*columns, box=box.ROUNDED, title=title, title_justify="left", show_lines=True)
    for question, old, new in zip(QUESTIONS, before, after, strict=False):
        table.add_row(Text(question, style="bold"), _shown(old), _shown(new))
    return table


def outcome(job: Job, seconds: float) -> str:
    before, after = (job.held_out[side] or 0.0 for side in ("before", "after"))
    return (
        f"{job.state} after {job.progress['steps']} steps in {seconds:.0f} s: loss on held-out samples "
        f"{before:.2f} → {after:.2f}"
    )


def loss_curve(job: Job) -> list[str]:
    """Return the lines of a small plot of the training loss, a column a step, with its range at the side."""
    losses = [loss for _, loss in job.progress["loss"]]
    low, high = min(losses), max(losses)
    levels = [round((loss - low) / (high - low or 1) * (8 * _HEIGHT - 1)) + 1 for loss in losses]
    lines = []
    for row in reversed(range(_HEIGHT)):
        bars = "".join(_BLOCKS[min(8, max(0, level - 8 * row))] for level in levels)
        label = f"{high:5.2f}" if row == _HEIGHT - 1 else f"{low:5.2f}" if row == 0 else " " * 5
        lines.append(f"{label} ┤{bars}")
    return lines


def _shown(answer: DemoAnswer) -> Text:
    return answer.shown.append(f"\n\n{', '.join((answer.level, *answer.own_words))}", "dim")
