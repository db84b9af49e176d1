"""Training on a thread while a lease is held, without a model and a store: how it ends, and what curves it leaves."""

from __future__ import annotations

import asyncio
import itertools
import math
import threading
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import TrainingError
from adapters.training.user_trainer import Judgement, TrainingProgress, TrainingRun
from server.store.samples import Curve
from server.worker.lease import LeaseLost
from server.worker.training_thread import MOST_POINTS, Points, ProgressLog, train_holding

JUDGEMENT = Judgement(None, 2.0, 1.0, 3)


class Run:
    """Training of three steps, the second of which waits until it may be done.

    Attributes:
        steps: how many were taken.
        left: whether it has been ended, by its end or from outside.
    """

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
    monkeypatch.setattr("server.worker.training_thread.RENEW_S", 0.01)


def held(run: Run, *, lost: bool = False) -> Any:
    """A lease that is renewed, or lost, once the first step is taken; the second ends a moment later."""

    async def renew(progress: TrainingProgress, curve: Curve) -> None:
        if progress.step:
            threading.Timer(0.1, run.may_go_on.set).start()
            if lost:
                raise LeaseLost

    return SimpleNamespace(renew=renew, lease=SimpleNamespace(job=SimpleNamespace(id="a.1")))


async def test_training_under_a_lease_that_holds_comes_to_its_end() -> None:
    run = Run()
    assert await train_holding(held(run), 60, run.training) is JUDGEMENT
    assert (run.steps, run.left) == (3, True)


async def test_training_whose_lease_is_lost_is_left_after_the_step_that_is_being_taken() -> None:
    run = Run()
    with pytest.raises(LeaseLost):
        await train_holding(held(run, lost=True), 60, run.training)
    assert (run.steps, run.left) == (2, True)


async def test_who_is_cancelled_does_not_wait_for_the_step_that_is_being_taken_which_is_the_last() -> None:
    run, renewed = Run(), asyncio.Event()

    async def renew(progress: TrainingProgress, curve: Curve) -> None:
        if progress.step:
            renewed.set()

    lease: Any = SimpleNamespace(renew=renew, lease=SimpleNamespace(job=SimpleNamespace(id="a.1")))
    holding = asyncio.create_task(train_holding(lease, 60, run.training))
    await renewed.wait()
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    assert run.steps == 1
    run.may_go_on.set()
    await asyncio.get_running_loop().shutdown_default_executor()  # as the process does when it ends
    assert (run.steps, run.left) == (2, True)


async def test_training_that_takes_longer_than_it_may_is_left_where_it_is() -> None:
    run = Run()
    with pytest.raises(TrainingError, match="limit of 0 s, at step 1 of 3"):
        await train_holding(held(run), 0, run.training)
    assert (run.steps, run.left) == (1, True)


@pytest.mark.parametrize("count", [0, 1, 2, MOST_POINTS - 1, MOST_POINTS, MOST_POINTS + 1, 5_000])
def test_a_curve_is_bounded_ends_with_the_last_point_and_is_evenly_spaced(count: int) -> None:
    curve = Points()
    for step in range(count):
        curve.add(step, step / 2)
        assert curve.points[-1] == (step, step / 2)
    steps = [step for step, _ in curve.points]
    assert len(steps) == count if count < MOST_POINTS else MOST_POINTS / 2 <= len(steps) <= MOST_POINTS
    assert all(loss == step / 2 for step, loss in curve.points)
    gaps = {after - before for before, after in itertools.pairwise(steps[:-1])}
    assert len(gaps) <= 1
    assert steps == sorted(set(steps))


def test_a_loss_that_is_no_number_is_left_out() -> None:
    curve = Points()
    for step, loss in enumerate((1.0, math.nan, math.inf, 2.0)):
        curve.add(step, loss)
    assert curve.points == ((0, 1.0), (3, 2.0))


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
