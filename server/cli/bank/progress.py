"""How far a bank's build has come: a live bar on a terminal, a line every few seconds anywhere else."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

if TYPE_CHECKING:
    from adapters.training.trainer import StepReport

LINE_EVERY_S = 5.0
RECENT_STEPS = 30  # the estimate follows the machine as it is now, not as it was when the build began


class ConsoleProgress:
    """Prints what is trained, step, loss, and an estimate of what is left. Writes to stderr."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._total_tokens = 0
        self._done_tokens = 0
        self._rows: list[str] = []
        self._recent: deque[tuple[float, int]] = deque(maxlen=RECENT_STEPS)
        self._line_s = time.monotonic()
        self._live: Progress | None = None

    def __enter__(self) -> ConsoleProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line of its own."""
        self._console.print(text, soft_wrap=True)

    def begin(self, work_tokens: Mapping[str, int]) -> None:
        """Take note of all that is to be trained; the estimate starts here."""
        self._rows = list(work_tokens)
        self._total_tokens = sum(work_tokens.values())
        self._done_tokens = 0
        self._line_s = time.monotonic()
        self._recent.clear()
        self._recent.append((self._line_s, 0))
        if self._rows and self._console.is_terminal:
            self._show(self._total_tokens)

    def step(self, row: str, steps: int, report: StepReport) -> None:
        """Show one step; without a terminal only the last of a row and one every few seconds."""
        self._done_tokens += report.tokens
        now_s = time.monotonic()
        self._recent.append((now_s, self._done_tokens))
        text = (
            f"training {row} ({self._rows.index(row) + 1} of {len(self._rows)})  step {report.step}/{steps}  "
            f"loss {report.loss:.3f}  {self._left()}"
        )
        self._tell(text, self._done_tokens, last=report.step == steps)

    def piece(self, what: str, done: int, of: int) -> None:
        """Show that so many pieces of other work are done."""
        if done == 1 and self._console.is_terminal:
            self._show(of)
        self._tell(f"{what}: {done} of {of}", done, last=done == of)

    def _show(self, total: int) -> None:
        """A bar for what comes now, below those that are full."""
        if self._live is None:
            self._live = Progress(BarColumn(), TextColumn("{task.description}"), console=self._console)
            self._live.start()
        self._live.add_task("", total=total)

    def _tell(self, text: str, completed: int, *, last: bool) -> None:
        now_s = time.monotonic()
        if self._live is not None:
            self._live.update(self._live.task_ids[-1], completed=completed, description=text)
        elif last or now_s - self._line_s >= LINE_EVERY_S:
            self._line_s = now_s
            self._console.print(text, soft_wrap=True)

    def _left(self) -> str:
        (start_s, start_tokens), (now_s, now_tokens) = self._recent[0], self._recent[-1]
        tokens_per_s = (now_tokens - start_tokens) / max(now_s - start_s, 1e-9)
        left_s = max(0, self._total_tokens - self._done_tokens) / max(tokens_per_s, 1e-9)
        return f"{tokens_per_s:.0f} tokens/s  about {int(left_s // 60)}:{int(left_s % 60):02d} min left"
