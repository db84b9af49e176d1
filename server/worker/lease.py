"""Training on a thread while its lease is held, by the worker's own clock.

A thread cannot be ended from outside: only its process can.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeVar

from adapters.errors import TrainingError
from adapters.training.user_trainer import Judgement, TrainingProgress, TrainingRun
from server.errors import Unavailable
from server.store.jobs import JobStore, Lease
from server.store.samples import Curve, Point

log = logging.getLogger("mta.worker")

LEASE_S = 15.0
RENEW_S = 1.0
ANSWER_S = 4.0  # how long to wait for an answer before calling the store again: a lost answer must not use up the lease
STALL_S = 600.0
"""A computation that shows no sign of life for this long hangs: a slow processor takes a minute for a step of a full
context."""

MOST_POINTS = 200  # of each curve
P = ParamSpec("P")
T = TypeVar("T")


class LeaseLost(Exception):
    """The job has ended or is another worker's: this one's result is no longer wanted."""


class StoreSilent(Exception):
    """The store gave no answer for as long as it may take."""


class Stalled(Exception):
    """A computation shows no sign of life; this process cannot go on."""


async def retry_until(until_s: float, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """The store's answer to a call that may be repeated; StoreSilent without one at `until_s` by `time.monotonic`.

    Raises TrainingError when what is stored of the user is damaged.
    """
    while True:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await call(*args, **kwargs)
        except (Unavailable, TimeoutError) as error:
            _wait_for_store(error, until_s)
        await asyncio.sleep(RENEW_S)


def _wait_for_store(error: Unavailable | TimeoutError, until_s: float) -> None:
    """Log that the store is away; raises where waiting does not help."""
    cause = error.__cause__ or error.__context__
    while cause is not None:  # a connection that fails for lack of memory or threads is not the store's fault
        if isinstance(cause, MemoryError | RuntimeError) or getattr(cause, "errno", None) == errno.ENOMEM:
            raise RuntimeError(f"this process can no longer reach the store: {cause!r}") from error
        cause = cause.__cause__ or cause.__context__
    reason = f"the store gave no answer within {ANSWER_S:g} s"
    if isinstance(error, Unavailable):
        reason = error.explained
        if error.code == "store_corrupt":
            raise TrainingError(f"{error.message}: delete the user and send the profile again") from error
    if time.monotonic() >= until_s:
        raise StoreSilent(reason) from error
    log.warning("%s", reason)


class HeldLease:
    """A lease that this worker holds, for as long as it can be sure of it.

    The call that took it began at `since_s` by `time.monotonic`; the store counts from a later moment.
    """

    def __init__(self, jobs: JobStore, lease: Lease, since_s: float) -> None:
        self.lease = lease
        self._jobs = jobs
        self._until_s = since_s + LEASE_S
        self._written: Curve | None = None

    async def renew(self, progress: TrainingProgress, curve: Curve) -> None:
        """Extend it, and report how far training is; a curve is written only when it has changed.

        Raises LeaseLost when the store says so, and StoreSilent once it has run out without the store.
        """
        since_s = time.monotonic()
        try:
            async with asyncio.timeout(ANSWER_S):
                held = await self._jobs.renew(
                    self.lease,
                    LEASE_S,
                    step=progress.step,
                    of=progress.of,
                    loss=progress.loss if progress.step else None,
                    curve=None if curve == self._written else curve,
                )
        except (Unavailable, TimeoutError) as error:
            _wait_for_store(error, self._until_s)
            return
        if not held:
            raise LeaseLost
        self._until_s, self._written = since_s + LEASE_S, curve

    async def retry(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """`retry_until` the lease has run out."""
        return await retry_until(self._until_s, call, *args, **kwargs)


async def train_holding(held: HeldLease, most_s: float, train: Callable[[], TrainingRun]) -> Judgement:
    """Train on a thread, for `most_s` at most, and renew the lease meanwhile.

    When the lease is lost or the time is up, training ends at its next sign of life, and so does this. If it is
    cancelled, it does not wait for that: a step may take longer than a process that is stopped has left to hand its job
    back. The thread uses the model until then, and nothing else does, since the process ends.

    Raises TrainingError when it takes longer, or from `train`; LeaseLost and StoreSilent as the lease; Stalled.
    """
    thread = TrainingThread(str(held.lease.job.id), train, most_s)
    try:
        ended = False
        while not ended:
            ended = await thread.ended()
            await held.renew(thread.progress.latest, thread.progress.curve)
        judgement = thread.task.result()
        assert judgement is not None, "training is left early only once the lease is lost"
        return judgement
    except asyncio.CancelledError:
        thread.task.cancel()  # the thread goes on
        raise
    finally:
        thread.unwanted.set()
        while not await thread.ended():
            pass
        await asyncio.gather(thread.task, return_exceptions=True)


class TrainingThread:
    """The thread, started at once; `name` names the training in errors. Used from the event loop."""

    def __init__(self, name: str, train: Callable[[], TrainingRun], most_s: float) -> None:
        self.progress = ProgressLog()
        self.unwanted = threading.Event()  # has training end at its next sign of life
        self._name = name
        self._train = train
        self._most_s = most_s
        self._alive_s = time.monotonic()
        self.task = asyncio.create_task(asyncio.to_thread(self._run, self._alive_s + most_s))

    async def ended(self) -> bool:
        """Whether it has ended, or does so within `RENEW_S`; Stalled when the last sign of life is too long ago."""
        await asyncio.wait({self.task}, timeout=RENEW_S)
        if not self.task.done() and time.monotonic() - self._alive_s > STALL_S:
            raise Stalled(f"{self._name}: no step within {STALL_S:g} s; this process cannot go on")
        return self.task.done()

    def _run(self, end_s: float) -> Judgement | None:
        run = self._train()
        for latest in run:  # each is a sign of life
            self.progress.add(latest)
            self._alive_s = time.monotonic()
            if self.unwanted.is_set():
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
        self._loss, self._held_out = list[Point](), list[Point]()

    def add(self, progress: TrainingProgress) -> None:
        """Add progress; the same step may come several times. A loss that is not finite is left out."""
        if progress.step > self.latest.step and math.isfinite(progress.loss):
            self._loss.append((progress.step, round(progress.loss, 5)))
        if progress.held_out is not None and math.isfinite(progress.held_out):
            self._held_out.append((progress.step, round(progress.held_out, 5)))
        self.latest = progress

    @property
    def curve(self) -> Curve:
        return Curve(self.latest.phase, thinned(self._loss), thinned(self._held_out))


def thinned(points: list[Point]) -> tuple[Point, ...]:
    """At most `MOST_POINTS` points, evenly spaced, and always the last."""
    every = math.ceil(len(points) / (MOST_POINTS - 1))
    return (*points[:-1:every], points[-1]) if points else ()
