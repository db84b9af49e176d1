"""Training on a thread while a lease is held, without a model and a store: how it ends, and what curves it leaves."""

from __future__ import annotations

import asyncio
import errno
import itertools
import math
import threading
import time
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import TrainingError
from adapters.training.user_trainer import Judgement, TrainingProgress, TrainingRun
from server.errors import Unavailable
from server.store.samples import Curve
from server.worker.lease import (
    MAX_CURVE_POINTS,
    LeaseLost,
    ProgressLog,
    Stalled,
    StoreTimeout,
    retry_until,
    thin,
    train_with_lease,
)

JUDGEMENT = Judgement(None, 2.0, 1.0, 3)


class Run:
    """Training of three steps, the second of which waits until it may be done."""

    def __init__(self) -> None:
        self.steps, self.left, self.may_go_on = 0, False, threading.Event()

    def training(self) -> TrainingRun:
        return TrainingRun(self._run())

    def _run(self) -> Generator[TrainingProgress, None, Judgement]:
        try:
            for step in (1, 2, 3):
                if step == 2:
                    self.may_go_on.wait(10)
                self.steps = step
                yield TrainingProgress(step, 3, 1.0)
            return JUDGEMENT
        finally:
            self.left = True


@pytest.fixture(autouse=True)
def quick_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.worker.lease.RENEW_S", 0.01)


@pytest.fixture
def run() -> Run:
    return Run()


def held(run: Run, *, lost: bool = False) -> Any:
    """A lease that is renewed, or lost, once the first step is taken; the second ends a moment later."""

    async def renew(progress: TrainingProgress, curve: Curve) -> None:
        if progress.step:
            threading.Timer(0.1, run.may_go_on.set).start()
            if lost:
                raise LeaseLost

    return SimpleNamespace(renew=renew, lease=SimpleNamespace(job=SimpleNamespace(id="a.1")))


async def test_training_whose_lease_is_lost_is_left_after_the_step_that_is_being_taken(run: Run) -> None:
    with pytest.raises(LeaseLost):
        await train_with_lease(held(run, lost=True), 60, run.training)
    assert (run.steps, run.left) == (2, True)


async def test_who_is_cancelled_does_not_wait_for_the_step_that_is_being_taken_which_is_the_last(run: Run) -> None:
    renewed = asyncio.Event()

    async def renew(progress: TrainingProgress, curve: Curve) -> None:
        if progress.step:
            renewed.set()

    lease: Any = SimpleNamespace(renew=renew, lease=SimpleNamespace(job=SimpleNamespace(id="a.1")))
    holding = asyncio.create_task(train_with_lease(lease, 60, run.training))
    await renewed.wait()
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    assert run.steps == 1
    run.may_go_on.set()
    await asyncio.get_running_loop().shutdown_default_executor()  # as the process does when it ends
    assert (run.steps, run.left) == (2, True)


async def test_training_that_takes_longer_than_it_may_is_left_where_it_is(run: Run) -> None:
    with pytest.raises(TrainingError, match="limit of 0 s, at step 1 of 3"):
        await train_with_lease(held(run), 0, run.training)
    assert (run.steps, run.left) == (1, True)


async def test_training_without_a_sign_of_life_cannot_be_waited_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.worker.lease.STALL_S", 0.05)
    with pytest.raises(Stalled, match=r"a\.1: no step"):
        await train_with_lease(held(run), 60, run.training)
    run.may_go_on.set()


@pytest.mark.parametrize(
    ("cause", "becomes"),
    [
        (None, StoreTimeout),
        (OSError(errno.ECONNREFUSED, "refused"), StoreTimeout),
        (MemoryError(), RuntimeError),
        (RuntimeError("can't start new thread"), RuntimeError),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), RuntimeError),
    ],
)
async def test_the_store_is_waited_for_unless_this_process_lacks_what_it_takes(
    cause: Exception | None, becomes: type[Exception]
) -> None:
    calls = 0

    async def call() -> None:
        nonlocal calls
        calls += 1
        try:
            raise ConnectionError from cause
        except ConnectionError as error:
            raise Unavailable("the store cannot be used now") from error

    with pytest.raises(becomes, match="the store"):
        await retry_until(time.monotonic() + 0.05, call)
    assert (calls > 1) is (becomes is StoreTimeout)


@pytest.mark.parametrize("count", [0, 1, 2, MAX_CURVE_POINTS - 1, MAX_CURVE_POINTS, MAX_CURVE_POINTS + 1, 5_000])
def test_a_curve_is_bounded_ends_with_the_last_point_and_is_evenly_spaced(count: int) -> None:
    points = [(step, step / 2) for step in range(count)]
    kept = thin(points)
    assert kept[-1:] == tuple(points[-1:])
    assert kept == tuple(points) if count < MAX_CURVE_POINTS else MAX_CURVE_POINTS / 2 <= len(kept) <= MAX_CURVE_POINTS
    assert set(kept) <= set(points)
    assert len({after[0] - before[0] for before, after in itertools.pairwise(kept[:-1])}) <= 1


def test_a_loss_that_is_no_number_is_left_out() -> None:
    told = ProgressLog()
    for step, loss in enumerate((1.0, math.nan, math.inf, 2.0), 1):
        told.add(TrainingProgress(step, 4, loss, held_out=loss))
    assert told.curve.loss == told.curve.held_out == ((1, 1.0), (4, 2.0))


def test_a_step_that_is_told_twice_counts_once_and_a_held_out_loss_whenever_it_is_told() -> None:
    told = ProgressLog()
    assert (told.curve.phase, told.curve.loss, told.curve.held_out) == ("", (), ())
    for progress in (
        TrainingProgress(0, 0, 0.0, "fold 1 of 2"),
        TrainingProgress(0, 0, 0.0, "fold 1 of 2", held_out=3.0),
        TrainingProgress(1, 4, 2.5, "fold 1 of 2"),
        TrainingProgress(1, 4, 2.5, "fold 1 of 2"),
        TrainingProgress(2, 4, 2.0, "fold 1 of 2", held_out=2.25),
        TrainingProgress(2, 4, 2.0, "fold 2 of 2", held_out=3.5),
    ):
        told.add(progress)
    assert (told.curve.phase, told.curve.loss) == ("fold 2 of 2", ((1, 2.5), (2, 2.0)))
    assert told.curve.held_out == ((0, 3.0), (2, 2.25), (2, 3.5))
