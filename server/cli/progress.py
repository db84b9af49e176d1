"""Progress of a bank's build: a live bar on a terminal, otherwise a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from bank.building.progress import RowProgress

if TYPE_CHECKING:
    from adapters.training.trainer import StepReport

LINE_EVERY_S = 5.0


class ConsoleProgress(RowProgress, AbstractContextManager["ConsoleProgress"]):
    """Prints steps, loss and the estimated remaining time to stderr; each phase of work has its own bar."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._rows: list[str] = []
        self._pieces: str | None = None
        self._line_s = clock()
        self._bars = Progress(
            BarColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            get_time=clock,
            speed_estimate_period=300.0,  # the remaining time is estimated from recent progress
            disable=not self._console.is_terminal,
        )

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, markup=False)

    def begin(self, work_tokens: Mapping[str, int]) -> None:
        self._rows, self._pieces = list(work_tokens), None
        if self._rows:
            self._start("", 0, sum(work_tokens.values()))

    def step(self, row: str, steps: int, report: StepReport) -> None:
        work = self._bars.tasks[-1]
        left = self._advance(work.completed + report.tokens)
        number = f"{self._rows.index(row) + 1} of {len(self._rows)}"
        speed = f"loss {report.loss:.3f}  {work.speed or 0:.0f} tokens/s{left}"
        self._show(f"training {row} ({number})  step {report.step}/{steps}  {speed}", last=report.step == steps)

    def piece(self, what: str, done: int, of: int) -> None:
        """Show the number of finished pieces of other work; the first call for a phase sets its starting point."""
        text = f"{what}: {done} of {of}"
        if what == self._pieces:
            text += self._advance(done)
        else:
            self._pieces = what
            self._start(text, done, of)
        self._show(text, last=done == of)

    def _start(self, text: str, done: int, total: int) -> None:
        self._line_s = self._clock()
        self._bars.start()
        self._bars.add_task(text, completed=done, total=total)

    def _advance(self, done: float) -> str:
        """Move the bar, and return the estimated remaining time as the end of a text; "" if it is not known."""
        work = self._bars.tasks[-1]
        self._bars.update(work.id, completed=done)
        left_s = work.time_remaining
        return "" if left_s is None else f"  about {int(left_s // 60)}:{int(left_s % 60):02d} min left"

    def _show(self, text: str, *, last: bool) -> None:
        """Update the bar; without a terminal, print a line every few seconds and the last one."""
        now_s = self._clock()
        if self._console.is_terminal:
            self._bars.update(self._bars.tasks[-1].id, description=text)
        elif last or now_s - self._line_s >= LINE_EVERY_S:
            self._line_s = now_s
            self._console.print(text, soft_wrap=True)
