"""What training tells of itself, gathered into curves that stay short however long it takes."""

from __future__ import annotations

import math

from adapters.training.user_run import Progress
from server.store.samples import Curve, Point

MOST_POINTS = 200
"""Of each curve."""


class Points:
    """The points of one curve: all of them, then every second, fourth … of them, and always the last."""

    def __init__(self) -> None:
        self._kept: list[Point] = []
        self._last: Point | None = None
        self._every = 1
        self._seen = 0

    def add(self, step: int, loss: float) -> None:
        """Add a point; one that is not finite is left out."""
        if not math.isfinite(loss):
            return
        self._last = step, round(loss, 5)
        if self._seen % self._every == 0 and len(self._kept) == MOST_POINTS - 1:
            self._kept, self._every = self._kept[::2], 2 * self._every
        if self._seen % self._every == 0:
            self._kept.append(self._last)
        self._seen += 1

    @property
    def points(self) -> tuple[Point, ...]:
        """In the order of their steps."""
        kept, last = tuple(self._kept), self._last
        return kept if last is None or kept[-1] == last else (*kept, last)


class Told:
    """What training told of itself: taken in by its thread, read by the event loop.

    Attributes:
        latest: the progress that was told last.
    """

    def __init__(self) -> None:
        self.latest = Progress(0, 0, 0.0)
        self._loss, self._held_out = Points(), Points()

    def take(self, progress: Progress) -> None:
        """Take in some progress; the same step may be told several times."""
        if progress.step > self.latest.step:
            self._loss.add(progress.step, progress.loss)
        if progress.held_out is not None:
            self._held_out.add(progress.step, progress.held_out)
        self.latest = progress

    @property
    def curve(self) -> Curve:
        """The curves up to now."""
        return Curve(self.latest.phase, self._loss.points, self._held_out.points)
