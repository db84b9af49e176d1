"""Training on a thread while a lease is held: how it ends, without a model and without a store."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator
from types import SimpleNamespace
from typing import Any

import pytest

from adapters.errors import TrainingError
from adapters.training.user_run import Progress
from adapters.training.user_trainer import Judgement, Training
from server.store.samples import Curve
from server.worker.leased.holding import train_holding
from server.worker.leased.lease import LeaseLost

JUDGEMENT = Judgement(None, 2.0, 1.0, 3)


class Run:
    """Training of three steps, the second of which waits until it may be done.

    Attributes:
        steps: how many were taken.
        left: whether it has been ended, by its end or from outside.
    """

    def __init__(self) -> None:
        self.steps, self.left, self.may_go_on = 0, False, threading.Event()

    def training(self) -> Training:
        return Training(self._run())

    def _run(self) -> Generator[Progress, None, Judgement]:
        try:
            for step in (1, 2, 3):
                if step == 2:
                    self.may_go_on.wait(10)
                self.steps = step
                yield Progress(step, 3, 1.0)
            return JUDGEMENT
        finally:
            self.left = True


@pytest.fixture(autouse=True)
def quick_renewals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.worker.leased.holding.RENEW_S", 0.01)


def held(run: Run, *, lost: bool = False) -> Any:
    """A lease that is renewed, or lost, once the first step is taken; the second ends a moment later."""

    async def renew(progress: Progress, curve: Curve) -> None:
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

    async def renew(progress: Progress, curve: Curve) -> None:
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
