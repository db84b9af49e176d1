"""Train a job on a thread while the worker holds the job's lease. A thread cannot be killed, only its process can."""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import re
import time
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

from adapters.errors import TrainingError
from adapters.training.user_trainer import Judgement, TrainingProgress, TrainingRun
from server.errors import Unavailable
from server.store.jobs import JobStore, Lease
from server.store.samples import Curve, Point

log = logging.getLogger("mta.worker")

LEASE_S = 15.0  # duration of a lease
RENEW_S = 1.0  # interval between renewals
STORE_TIMEOUT_S = 4.0  # timeout of one store call, short enough to retry within the lease
STALL_S = 600.0  # without progress, after which a computation counts as hung; a full context's step may take a minute
_NO_MEMORY = re.compile("out of memory|not enough memory|can't allocate memory")  # PyTorch's RuntimeErrors
MAX_CURVE_POINTS = 200  # maximum number of points of each curve
_MODEL_THREAD = ThreadPoolExecutor(1, "mta-model")
P = ParamSpec("P")
T = TypeVar("T")


class LeaseLost(Exception):
    """The job has ended or another worker has taken it, so the result is not needed."""


class StoreTimeout(Exception):
    """The store did not answer before the deadline."""


class Stalled(Exception):
    """A computation hangs; the process must restart."""


async def retry_until(until_s: float, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Retry an idempotent call; StoreTimeout at `until_s` by `time.monotonic`, TrainingError for damaged data."""
    while True:
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                return await call(*args, **kwargs)
        except (Unavailable, TimeoutError) as error:
            _raise_unless_transient(error, until_s)
        await asyncio.sleep(RENEW_S)


def _raise_unless_transient(error: Unavailable | TimeoutError, until_s: float) -> None:
    """Log that the store gave no answer; raise if retrying does not help."""
    cause = error.__cause__ or error.__context__
    while cause is not None:  # lack of memory or threads is a fault of this process, not of the store
        if isinstance(cause, MemoryError | RuntimeError) or getattr(cause, "errno", None) == errno.ENOMEM:
            raise RuntimeError(f"this process can no longer reach the store: {cause!r}") from error
        cause = cause.__cause__ or cause.__context__
    reason = f"the store gave no answer within {STORE_TIMEOUT_S:g} s"
    if isinstance(error, Unavailable):
        reason = error.explained
        if error.code == "store_corrupt":
            raise TrainingError(f"{error.message}: delete the user and send the profile again") from error
    if time.monotonic() >= until_s:
        raise StoreTimeout(reason) from error
    log.warning("%s", reason)


def on_model_thread(call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
    """Compute on the one thread that uses the model.

    OpenMP has a pool for each thread that computes. Pools with more threads than cores do not spin between operations,
    which makes training and signing take about 1.6 times as long.
    """
    here = copy_context()
    return asyncio.get_running_loop().run_in_executor(_MODEL_THREAD, partial(here.run, call, *args, **kwargs))


@dataclass
class HeldLease:
    """A lease held by this worker. It expires by the worker's own clock, which is earlier than in the store."""

    jobs: JobStore
    lease: Lease
    since_s: float  # by `time.monotonic`, just before the call that claimed the job or renewed the lease
    written_curve: Curve | None = None

    async def renew(self, progress: TrainingProgress, curve: Curve) -> None:
        """Extend the lease; LeaseLost if the store refuses, StoreTimeout if the lease expires without its answer."""
        since_s = time.monotonic()
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                new = None if curve == self.written_curve else curve
                held = await self.jobs.renew(self.lease, LEASE_S, step=progress.step, of=progress.of, curve=new)
        except (Unavailable, TimeoutError) as error:
            _raise_unless_transient(error, self.since_s + LEASE_S)
            return
        if not held:
            raise LeaseLost
        self.since_s, self.written_curve = since_s, curve

    async def retry(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        return await retry_until(self.since_s + LEASE_S, call, *args, **kwargs)


async def with_lease(held: HeldLease, work: asyncio.Task[T], progress: ProgressLog) -> T:
    """Renew the lease while `work` runs, and once more; return its result. Errors of the lease leave it running."""
    ended = False
    while not ended:
        ended = bool((await asyncio.wait({work}, timeout=RENEW_S))[0])
        await held.renew(progress.latest, progress.curve)
    return work.result()


async def train_with_lease(
    held: HeldLease, max_s: float, train: Callable[[], TrainingRun], model_lock: asyncio.Lock
) -> Judgement:
    """Train for at most `max_s`, and renew the lease meanwhile; see `SharedTraining`.

    After a lost lease or a timeout, wait until training stops at its next step. After a cancellation, do not wait: a
    step may take longer than a stopping process has left to release its job. Raises TrainingError after `max_s` or from
    `train`; LeaseLost and StoreTimeout from the lease; and Stalled.
    """
    training = SharedTraining(str(held.lease.job.id), train, max_s, model_lock, ProgressLog())
    task = asyncio.create_task(training.run())
    try:
        return await with_lease(held, task, training.progress)
    except asyncio.CancelledError:
        task.cancel()  # does not stop the thread
        raise
    finally:
        training.stop = True
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(outcome, Stalled):
            raise outcome


@dataclass
class SharedTraining:
    """One job's training, which holds the model's lock for one step at a time, so that others come in between."""

    name: str  # for errors
    train: Callable[[], TrainingRun]
    max_s: float  # for all steps
    model_lock: asyncio.Lock
    progress: ProgressLog
    stop: bool = False  # makes training stop after its next step
    taken_s: float = 0.0

    async def run(self) -> Judgement:
        """Train to the end; raise LeaseLost after `stop`, and other errors as `train_with_lease` does."""
        run = await self._with_model(self.train)
        steps = iter(run)
        while (latest := await self._with_model(lambda: next(steps, None))) is not None:
            self.progress.add(latest)
            if self.stop or self.taken_s > self.max_s:
                await self._with_model(steps.close)  # which restores the model
                if self.stop:
                    raise LeaseLost
                raise TrainingError(
                    f"training ran over its limit of {self.max_s:g} s, at step {latest.step} of {latest.of}: "
                    "send fewer or shorter samples, or ask for fewer steps"
                )
        assert run.judgement is not None
        return run.judgement

    async def _with_model(self, call: Callable[[], T]) -> T:
        await self.model_lock.acquire()
        since_s = time.monotonic()
        task = on_model_thread(call)
        task.add_done_callback(lambda _: self.model_lock.release())  # a hung thread keeps the model
        try:
            return await unless_stalled(task, f"{self.name}: no step")
        except (MemoryError, RuntimeError) as error:
            if not (isinstance(error, MemoryError) or _NO_MEMORY.search(str(error))):
                raise
            traceback.clear_frames(error.__traceback__)  # what they hold is memory that this process needs
            raise TrainingError(
                f"training ran out of memory after {self.progress.latest.step} steps: send shorter samples, or give "
                "workers more memory"
            ) from error
        finally:
            self.taken_s += time.monotonic() - since_s


async def unless_stalled(task: asyncio.Future[T], what: str) -> T:
    """Return a task's result. Raise Stalled after `STALL_S`; the task then goes on, as it does after a cancellation."""
    await asyncio.wait({task}, timeout=STALL_S)
    if not task.done():
        raise Stalled(f"{what} within {STALL_S:g} s; the worker must restart")
    return task.result()


class ProgressLog:
    """The latest progress and the loss curves, written by the training thread and read by the event loop."""

    def __init__(self) -> None:
        self.latest = TrainingProgress(0, 0, 0.0)
        self._loss, self._held_out = list[Point](), list[Point]()
        self._runs, self._shown = list[tuple[int, str]](), tuple[str, ...]()

    def add(self, progress: TrainingProgress) -> None:
        """Add progress. A step may be reported several times; losses that are not finite are dropped."""
        if progress.phase != self.latest.phase:
            self._runs.append((progress.step, progress.phase))
        self._shown = progress.shown or self._shown
        if progress.step > self.latest.step and math.isfinite(progress.loss):
            self._loss.append((progress.step, round(progress.loss, 5)))
        if progress.held_out is not None and math.isfinite(progress.held_out):
            self._held_out.append((progress.step, round(progress.held_out, 5)))
        self.latest = progress

    @property
    def curve(self) -> Curve:
        return Curve(self.latest.phase, thin(self._loss), thin(self._held_out), tuple(self._runs), self._shown)


def thin(points: list[Point]) -> tuple[Point, ...]:
    """Return at most `MAX_CURVE_POINTS` evenly spaced points, including the last."""
    stride = math.ceil(len(points) / (MAX_CURVE_POINTS - 1))
    return (*points[:-1:stride], points[-1]) if points else ()
