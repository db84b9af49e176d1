"""Progress of a bank's build: a live bar on a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from adapters.training.trainer import StepReport

LINE_EVERY_S = 5.0
RECENT_STEPS = 30  # the estimate follows the machine as it is now, not as it was when the build began


class ConsoleProgress:
    """Prints what is done, step, loss, and an estimate of what is left. Writes to stderr."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._rows: list[str] = []
        self._pieces: str | None = None
        self._line_s = clock()
        self._work = _Work(0, 0, self._line_s)
        self._live: Progress | None = None

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a separate line."""
        self._console.print(text, soft_wrap=True)

    def begin(self, work_tokens: Mapping[str, int]) -> None:
        """Note what is to be trained, as tokens per row; the estimate starts here."""
        self._rows, self._pieces = list(work_tokens), None
        if self._rows:
            self._start(0, sum(work_tokens.values()))

    def step(self, row: str, steps: int, report: StepReport) -> None:
        """Show one step; without a terminal, only a row's last one and one every few seconds."""
        self._work.reach(self._work.done + report.tokens, self._clock())
        text = (
            f"training {row} ({self._rows.index(row) + 1} of {len(self._rows)})  step {report.step}/{steps}  "
            f"loss {report.loss:.3f}  {self._work.per_s:.0f} tokens/s  {self._work.left}"
        )
        self._tell(text, last=report.step == steps)

    def piece(self, what: str, done: int, of: int) -> None:
        """Show how many pieces of other work are done; the first call announces it, and where it begins."""
        if what != self._pieces:
            self._pieces = what
            self._start(done, of)
            self._tell(f"{what}: {done} of {of}", last=done == of)
        else:
            self._work.reach(done, self._clock())
            self._tell(f"{what}: {done} of {of}  {self._work.left}", last=done == of)

    def _start(self, done: int, total: int) -> None:
        """Begin new work; on a terminal, with a bar of its own below the finished ones."""
        self._line_s = self._clock()
        self._work = _Work(done, total, self._line_s)
        if self._console.is_terminal:
            if self._live is None:
                self._live = Progress(BarColumn(), TextColumn("{task.description}"), console=self._console)
                self._live.start()
            self._live.add_task("", total=total)

    def _tell(self, text: str, *, last: bool) -> None:
        now_s = self._clock()
        if self._live is not None:
            bar = self._live.task_ids[-1]
            self._live.update(bar, completed=self._work.done, description=text, refresh=True)
        elif last or now_s - self._line_s >= LINE_EVERY_S:
            self._line_s = now_s
            self._console.print(text, soft_wrap=True)


class _Work:
    """Work of a known size, and how fast it goes."""

    def __init__(self, done: int, total: int, now_s: float) -> None:
        self._total = total
        self._recent = deque([(now_s, done)], maxlen=RECENT_STEPS)

    def reach(self, done: int, now_s: float) -> None:
        """Note how much is done now."""
        self._recent.append((now_s, done))

    @property
    def done(self) -> int:
        return self._recent[-1][1]

    @property
    def per_s(self) -> float:
        (start_s, start), (now_s, now) = self._recent[0], self._recent[-1]
        return (now - start) / max(now_s - start_s, 1e-9)

    @property
    def left(self) -> str:
        left_s = max(0, self._total - self.done) / max(self.per_s, 1e-9)
        return f"about {int(left_s // 60)}:{int(left_s % 60):02d} min left"
