"""Training on a thread while its lease is held. A thread cannot be ended from outside: only its process can."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Callable

from adapters.errors import TrainingError
from adapters.training.user_trainer import Judgement, TrainingProgress, TrainingRun
from server.store.samples import Curve, Point
from server.worker.lease import RENEW_S, HeldLease

STALL_S = 600.0
"""A computation that makes no step, and reads no item between steps, for this long is not just slow: a slow processor
takes a minute for a step of a full context."""

MOST_POINTS = 200
"""Of each curve."""


class Stalled(Exception):
    """A computation shows no sign of life; this process cannot go on."""


async def train_holding(held: HeldLease, most_s: float, train: Callable[[], TrainingRun]) -> Judgement:
    """Train on a thread, for `most_s` at most, and renew the lease meanwhile.

    When the lease is lost or the time is up, training ends at its next sign of life, and so does this. Whoever cancels
    this does not wait for that: a step may take longer than a process that is stopped has left to hand its job back.
    The thread still has the model until then; nothing may use it after that, and nothing does, since the process ends.

    Raises TrainingError when it takes longer, or from `train`; LeaseLost and StoreSilent as the lease; Stalled.
    """
    thread = TrainingThread(str(held.lease.job.id), train, most_s)
    try:
        while not await thread.ended():
            await held.renew(thread.progress.latest, thread.progress.curve)
        await held.renew(thread.progress.latest, thread.progress.curve)
        return thread.judgement()
    except asyncio.CancelledError:
        thread.drop()
        raise
    finally:
        await thread.leave()


class TrainingThread:
    """The thread, started at once; `name` names the training in errors. Used from the event loop."""

    def __init__(self, name: str, train: Callable[[], TrainingRun], most_s: float) -> None:
        self.progress = ProgressLog()
        self._name = name
        self._train = train
        self._most_s = most_s
        self._unwanted = threading.Event()
        self._alive_s = time.monotonic()
        self._task = asyncio.create_task(asyncio.to_thread(self._run, self._alive_s + most_s))

    async def ended(self) -> bool:
        """Whether it has ended, or does so within `RENEW_S`; Stalled when the last sign of life is too long ago."""
        await asyncio.wait({self._task}, timeout=RENEW_S)
        if not self._task.done() and time.monotonic() - self._alive_s > STALL_S:
            raise Stalled(f"{self._name}: no step within {STALL_S:g} s; this process cannot go on")
        return self._task.done()

    def judgement(self) -> Judgement:
        """The outcome of training that has ended by itself; raises what it raised."""
        judgement = self._task.result()
        assert judgement is not None, "training is left early only once the lease is lost"
        return judgement

    def drop(self) -> None:
        """Wait for the thread no longer: it goes on to its next sign of life, and what comes of it is dropped."""
        self._task.cancel()

    async def leave(self) -> None:
        """Have training end at its next sign of life, and wait for that."""
        self._unwanted.set()
        while not await self.ended():
            pass
        await asyncio.gather(self._task, return_exceptions=True)

    def _run(self, end_s: float) -> Judgement | None:
        """What the thread does; every progress is a sign of life."""
        run = self._train()
        for latest in run:
            self.progress.add(latest)
            self._alive_s = time.monotonic()
            if self._unwanted.is_set():
                break
            if self._alive_s > end_s:
                raise TrainingError(
                    f"training ran over its limit of {self._most_s:g} s, at step {latest.step} of {latest.of}: "
                    "send fewer or shorter samples, or ask for fewer steps"
                )
        return run.judgement


class ProgressLog:
    """The latest progress of training, and its curves: added by the thread, read by the event loop."""

    def __init__(self) -> None:
        self.latest = TrainingProgress(0, 0, 0.0)
        self._loss, self._held_out = Points(), Points()

    def add(self, progress: TrainingProgress) -> None:
        """Add some progress; the same step may come several times."""
        if progress.step > self.latest.step:
            self._loss.add(progress.step, progress.loss)
        if progress.held_out is not None:
            self._held_out.add(progress.step, progress.held_out)
        self.latest = progress

    @property
    def curve(self) -> Curve:
        """The curves up to now."""
        return Curve(self.latest.phase, self._loss.points, self._held_out.points)


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
