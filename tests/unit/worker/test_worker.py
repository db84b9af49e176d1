"""A worker without a model or a store: training with a lease, curves, metrics and the order of a signature's steps."""

from __future__ import annotations

import asyncio
import errno
import itertools
import math
import socket
import threading
from collections.abc import Callable, Generator
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest

from adapters.errors import MtaError, TrainingError
from adapters.training.user_trainer import Judgement, TrainingProgress, TrainingRun
from bank.items.tasks import get_task
from bank.lookup.signature import empty_signature
from server.errors import Unavailable
from server.settings import Settings
from server.store.jobs import Job, JobId, JobState
from server.store.profile_record import Profile, StoredItem
from server.store.profiles import Snapshot
from server.store.samples import Curve
from server.supervisor.services import free_port
from server.worker import lease
from server.worker.lease import (
    MAX_CURVE_POINTS,
    LeaseLost,
    ProgressLog,
    Stalled,
    StoreTimeout,
    on_model_thread,
    retry_until,
    thin,
    train_with_lease,
    with_lease,
)
from server.worker.loops import SigningLoop, WorkerMetrics

BANK = "9f2c41d0"
JUDGEMENT = Judgement(None, 2.0, 1.0, 3)


class Run:
    """Training of three steps, the second of which waits for `may_go_on`."""

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
    """And turns that do not end because the machine is slow."""
    monkeypatch.setattr("server.worker.lease.RENEW_S", 0.01)
    monkeypatch.setattr("server.worker.loops.MAX_TURN_S", 600.0)


@pytest.fixture
def run() -> Run:
    return Run()


def held(at_first_step: Callable[[], object]) -> Any:
    """A lease that is renewed; something happens at the first renewal after the first step."""

    async def renew(progress: TrainingProgress, curve: Curve) -> None:
        if progress.step:
            at_first_step()

    return SimpleNamespace(renew=renew, lease=SimpleNamespace(job=SimpleNamespace(id="a.1")))


async def test_training_ends_after_its_step_when_the_lease_is_lost(run: Run) -> None:
    def lose() -> None:
        threading.Timer(0.1, run.may_go_on.set).start()
        raise LeaseLost

    with pytest.raises(LeaseLost):
        await train_with_lease(held(lose), 60, run.training, asyncio.Lock())
    assert (run.steps, run.left) == (2, True)


async def test_cancellation_does_not_wait_for_the_last_step(run: Run) -> None:
    renewed = asyncio.Event()
    holding = asyncio.create_task(train_with_lease(held(renewed.set), 60, run.training, asyncio.Lock()))
    await renewed.wait()
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding
    assert run.steps == 1
    run.may_go_on.set()
    await on_model_thread(lambda: None)  # comes after it
    assert (run.steps, run.left) == (2, True)


async def test_training_ends_at_its_time_limit(run: Run) -> None:
    with pytest.raises(TrainingError, match="limit of 0 s, at step 1 of 3"):
        await train_with_lease(held(run.may_go_on.set), 0, run.training, asyncio.Lock())
    assert (run.steps, run.left) == (1, True)


async def test_hung_training_is_not_awaited(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does anything else compute with the model that it may still be using."""
    monkeypatch.setattr("server.worker.lease.STALL_S", 0.05)
    lock = asyncio.Lock()
    with pytest.raises(Stalled, match=r"a\.1: no step"):
        await train_with_lease(held(lambda: None), 60, run.training, lock)
    assert lock.locked()
    run.may_go_on.set()


async def test_waiter_gets_the_model_after_the_step_in_progress(run: Run) -> None:
    lock, seen, waiting = asyncio.Lock(), list[int](), set[asyncio.Task[None]]()

    async def use_model() -> None:
        async with lock:
            seen.append(run.steps)

    def begin() -> None:
        if not waiting:
            waiting.add(asyncio.create_task(use_model()))
            asyncio.get_running_loop().call_soon(run.may_go_on.set)

    assert await train_with_lease(held(begin), 60, run.training, lock) is JUDGEMENT
    assert (seen, lock.locked()) == ([2], False)


async def test_time_for_which_others_have_the_model_is_no_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, lock = [0.0], asyncio.Lock()
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=lambda: now_s[0]))
    run.may_go_on.set()
    await lock.acquire()
    training = asyncio.create_task(train_with_lease(held(lambda: None), 60, run.training, lock))
    for _ in range(3):
        await asyncio.sleep(0)
    now_s[0] = 100.0
    lock.release()
    assert await training is JUDGEMENT


async def test_a_lease_is_renewed_while_other_work_of_its_job_runs() -> None:
    renewed = asyncio.Event()

    async def renew(progress: TrainingProgress, curve: Curve) -> None:
        renewed.set()

    lease: Any = SimpleNamespace(renew=renew)
    assert await with_lease(lease, asyncio.create_task(renewed.wait()), ProgressLog())


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
async def test_store_call_is_retried_unless_memory_or_threads_run_out(
    cause: Exception | None, becomes: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "time", SimpleNamespace(monotonic=itertools.count().__next__))
    calls = 0

    async def call() -> None:
        nonlocal calls
        calls += 1
        try:
            raise ConnectionError from cause
        except ConnectionError as error:
            raise Unavailable("the store cannot be used now") from error

    with pytest.raises(becomes, match="the store"):
        await retry_until(2, call)
    assert calls == (3 if becomes is StoreTimeout else 1)


@pytest.mark.parametrize("count", [0, 1, 2, MAX_CURVE_POINTS - 1, MAX_CURVE_POINTS, MAX_CURVE_POINTS + 1, 5_000])
def test_a_thinned_curve_is_evenly_spaced_up_to_the_last_point(count: int) -> None:
    points = [(step, step / 2) for step in range(count)]
    kept = thin(points)
    assert kept[-1:] == tuple(points[-1:])
    assert kept == tuple(points) if count < MAX_CURVE_POINTS else MAX_CURVE_POINTS / 2 <= len(kept) <= MAX_CURVE_POINTS
    assert set(kept) <= set(points)
    assert len({after[0] - before[0] for before, after in itertools.pairwise(kept[:-1])}) <= 1


def test_curve_has_one_finite_loss_a_step_and_held_out_losses() -> None:
    log = ProgressLog()
    assert (log.curve.phase, log.curve.loss, log.curve.held_out) == ("", (), ())
    for progress in (
        TrainingProgress(0, 0, 0.0, "fold 1 of 2"),
        TrainingProgress(0, 0, 0.0, "fold 1 of 2", held_out=3.0),
        TrainingProgress(1, 4, 2.5, "fold 1 of 2"),
        TrainingProgress(1, 4, 2.5, "fold 1 of 2"),
        TrainingProgress(2, 4, 2.0, "fold 1 of 2", held_out=2.25),
        TrainingProgress(2, 4, 2.0, "fold 1 of 2", shown=("Tea?", "Yes.", "No.", "Yes")),
        TrainingProgress(2, 4, 2.0, "fold 2 of 2", held_out=3.5),
        TrainingProgress(3, 4, math.nan, "fold 2 of 2", held_out=math.inf),
        TrainingProgress(4, 4, math.inf, "fold 2 of 2", held_out=math.nan),
    ):
        log.add(progress)
    assert (log.curve.phase, log.curve.loss) == ("fold 2 of 2", ((1, 2.5), (2, 2.0)))
    assert log.curve.held_out == ((0, 3.0), (2, 2.25), (2, 3.5))
    assert log.curve.runs == ((0, "fold 1 of 2"), (2, "fold 2 of 2"))
    assert log.curve.shown == ("Tea?", "Yes.", "No.", "Yes")


def shown(port: int) -> dict[str, float]:
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status().text.splitlines()
    parts = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in parts}


def test_job_wait_is_counted_once_and_job_time_at_each_try() -> None:
    figures, port = WorkerMetrics(), free_port()
    figures.publish(Settings(metrics_port=port))
    assert shown(port)['mta_worker_jobs_total{outcome="failed"}'] == 0
    for tries in (1, 2):
        job = Job(JobId("user", 1), JobState.RUNNING, "{}", 1_000, BANK, started_ms=4_000, tries=tries)
        with figures.training(job):
            assert shown(port)["mta_worker_job_running_seconds"] > 0
    found = shown(port)
    assert (found["mta_worker_job_wait_seconds_count"], found["mta_worker_job_wait_seconds_sum"]) == (1, 3)
    assert (found["mta_worker_job_seconds_count"], found["mta_worker_job_running_seconds"]) == (2, 0)


def test_a_port_in_use_is_named_and_by_default_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MtaError, match=f"127.0.0.1:{port}.*MTA_METRICS_PORT"):
            WorkerMetrics().publish(Settings(metrics_port=port))
    monkeypatch.setattr("server.worker.loops.start_http_server", lambda *_, **__: pytest.fail("it listens"))
    WorkerMetrics().publish(Settings())


def signing(steps: list[str], *waiting: str, **answers: object) -> SigningLoop:
    """A loop for users who are not signed; it notes each step, and whether the model is in use."""
    users = iter(waiting or ("key",))
    unsigned = Profile("ada", 1, 1, "0" * 16, np.ones(4, "f4"))
    given = {
        "read": Snapshot(b"", "", unsigned, {"a": StoredItem(0, {"text": "hello"})}, {}),
        "count_attempt": 1,
        "commit": True,
    } | answers

    def step(name: str) -> Any:
        async def called(*_: object) -> object:
            steps.append(f"{name}, {'busy' if loop.model_lock.locked() else 'free'}")
            answer = next(users, None) if name == "take" else given.get(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return called

    queue: Any = SimpleNamespace(
        **{name: step(name) for name in ("take", "count_attempt", "forget_attempts", "remove", "add")}
    )
    profiles: Any = SimpleNamespace(**{name: step(name) for name in ("read", "commit")})
    bank: Any = SimpleNamespace(manifest=SimpleNamespace(short=BANK, personal_rows=2), task=get_task("chat"))
    signer: Any = SimpleNamespace(signature=lambda _: empty_signature(BANK, 2), phrases=lambda _: b"")
    loop = SigningLoop(queue, profiles, bank, signer, asyncio.Lock())
    return loop


SIGNED = ("count_attempt, busy", "read, busy", "commit, busy", "remove, busy")
"""The steps of signing one user."""


@pytest.mark.parametrize(("is_stored", "more"), [(True, []), (False, ["add, busy"])])
async def test_signing_try_counts_only_once_the_model_is_free(is_stored: bool, more: list[str]) -> None:
    """While a worker waits for the model, others take its user again, which must not count."""
    steps = list[str]()
    assert await signing(steps, commit=is_stored).work_once(0)
    assert steps == ["take, free", *SIGNED, *more, "take, busy"]


@pytest.mark.parametrize(("turn_s", "signed"), [(600, 3), (0, 1)])
async def test_all_who_wait_are_signed_in_one_turn_of_bounded_time(
    monkeypatch: pytest.MonkeyPatch, turn_s: float, signed: int
) -> None:
    monkeypatch.setattr("server.worker.loops.MAX_TURN_S", turn_s)
    steps = list[str]()
    loop = signing(steps, "ada", "kai", "rosa")
    assert await loop.work_once(0)
    assert (steps.count("commit, busy"), loop.model_lock.locked()) == (signed, False)


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        ("read", ["count_attempt, busy", "read, busy", "forget_attempts, busy"]),
        ("commit", ["count_attempt, busy", "read, busy", "commit, busy", "forget_attempts, busy"]),
    ],
)
async def test_user_of_a_lost_server_is_left_for_later_without_a_try(
    gone: str, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.worker.loops.MAX_TURN_S", 0)
    steps = list[str]()
    async with asyncio.timeout(10):
        assert await signing(steps, **{gone: Unavailable("its primary is lost")}).work_once(0)
    assert steps == ["take, free", *left]


async def test_user_with_damaged_data_leaves_the_queue() -> None:
    steps = list[str]()
    assert await signing(steps, read=Unavailable("a damaged item", code="store_corrupt")).work_once(0)
    assert steps == ["take, free", "count_attempt, busy", "read, busy", "remove, busy", "take, busy"]


@pytest.mark.parametrize("failing", ["signature", "phrases"])
async def test_what_cannot_be_made_of_items_is_stored_as_empty(failing: str) -> None:
    def fail(_: object) -> None:
        raise TrainingError("the items cannot be used")

    steps = list[str]()
    loop = signing(steps)
    setattr(loop.signer, failing, fail)
    assert await loop.work_once(0)
    assert steps == ["take, free", *SIGNED, "take, busy"]
