"""A worker's lease while the store is away, while it loses answers, and while training takes too long or hangs."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis

from adapters.training.adapt_config import AdaptConfig
from adapters.training.user_trainer import TrainingRun
from bank.lookup.serving import ServingBank
from bench.rig.processes import PATIENCE_S, wait_until
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.store.jobs import MAX_TRIES, JobState, JobStore
from server.store.redis import keys
from server.store.redis.servers.connection import RedisConnection
from server.store.samples import encode_config
from server.worker.job_loop import JobLoop
from server.worker.process import work_forever
from server.worker.training import AdapterTrainer
from server.worker.training_thread import Stalled
from tests.integration.conftest import Interrupted
from tests.support.desk import SAMPLES, Desk


def shaky(name: str) -> Any:
    """A call of the store, which may fail or whose answer may be lost."""
    whole = getattr(JobStore, name)

    async def call(jobs: Shaky, *args: Any, **kwargs: Any) -> Any:
        answer = None if jobs.away else await whole(jobs, *args, **kwargs)
        if jobs.away or name in jobs.lost:
            jobs.lost.discard(name)
            jobs.failures += 1
            if jobs.silent:
                await asyncio.Event().wait()
            raise Unavailable("the store cannot be used now")
        return answer

    return call


class Shaky(JobStore):
    """Real jobs, some of whose answers do not arrive.

    Attributes:
        away: while it is set, nothing reaches the store.
        lost: names of calls whose next answer is lost after the store has done what was asked.
        silent: whether a lost answer is silence rather than an error.
        failures: how many calls failed.
    """

    def __init__(self, connection: RedisConnection) -> None:
        super().__init__(connection)
        self.away, self.lost, self.silent, self.failures = False, set[str](), False, 0

    renew, claim, samples = shaky("renew"), shaky("claim"), shaky("samples")
    end, promote, release = shaky("end"), shaky("promote"), shaky("release")


class Hanging:
    """A trainer whose training never ends by itself."""

    def __init__(self, trainer: AdapterTrainer) -> None:
        self.encoded, self.end = trainer.encoded, threading.Event()

    def train(self, *_: object) -> TrainingRun:
        self.end.wait()
        raise AssertionError


@pytest.fixture
def bank(trainer: AdapterTrainer, tiny_bank_folder: Path) -> ServingBank:
    return ServingBank.open(tiny_bank_folder, trainer.manifest.embedder.id)


@pytest.fixture
def jobs(desk: Desk) -> Shaky:
    return Shaky(desk.connection)


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that runs out in a test's time."""
    for module in ("lease", "job_loop"):
        monkeypatch.setattr(f"server.worker.{module}.LEASE_S", 0.5)
    for module in ("lease", "training_thread"):
        monkeypatch.setattr(f"server.worker.{module}.RENEW_S", 0.05)


async def test_a_store_that_is_killed_and_comes_back_within_the_lease_costs_no_training(
    desk: Desk, bank: ServingBank, trainer: AdapterTrainer, jobs: Shaky, store: ValkeyProcess
) -> None:
    steps: list[int] = []

    def restart() -> None:
        store.kill()
        wait_until(lambda: jobs.failures > 0, "a renewal to fail")
        store.start()

    async def renew(*args: Any, **kwargs: Any) -> Any:
        try:
            return await JobStore.renew(jobs, *args, **kwargs)
        except Unavailable:
            jobs.failures += 1
            raise

    jobs.renew = renew  # type: ignore[method-assign]
    job_id = await desk.submit()
    interrupted = Interrupted(trainer, restart, steps.append)
    assert await JobLoop(jobs, desk.profiles, bank, interrupted).work_once(1)
    job = await desk.job(job_id)
    assert (job.state, job.tries) == (JobState.SUCCEEDED, 1)
    assert steps.count(1) == 1


@pytest.mark.usefixtures("short_lease")
async def test_a_job_whose_lease_runs_out_without_the_store_is_given_up_and_given_back_and_is_no_try(
    desk: Desk, bank: ServingBank, trainer: AdapterTrainer, jobs: Shaky
) -> None:
    gone = threading.Event()

    def go_away() -> None:
        jobs.away = True

    def at_step(_: int) -> None:
        gone.wait(0.1)  # training that takes longer than the lease

    job_id = await desk.submit()
    worker = JobLoop(jobs, desk.profiles, bank, Interrupted(trainer, go_away, at_step))
    working = asyncio.create_task(worker.work_once(1))
    while jobs.failures < 15:
        await asyncio.sleep(0.05)
    assert not working.done()  # waits for the store
    jobs.away = False
    assert await working
    job = await desk.job(job_id)
    assert (job.state, job.tries, job.step) == (JobState.QUEUED, 0, 0)
    assert await JobLoop(jobs, desk.profiles, bank, trainer).work_once(1)
    job = await desk.job(job_id)
    assert (job.state, job.tries) == (JobState.SUCCEEDED, 1)


@pytest.mark.usefixtures("short_lease")
async def test_a_try_is_not_undone_when_another_worker_has_the_job_by_then(
    desk: Desk, bank: ServingBank, trainer: AdapterTrainer, jobs: Shaky
) -> None:
    def go_away() -> None:
        jobs.away = True

    job_id = await desk.submit()
    interrupted = Interrupted(trainer, go_away, lambda _: threading.Event().wait(0.1))
    worker = JobLoop(jobs, desk.profiles, bank, interrupted)
    working = asyncio.create_task(worker.work_once(1))
    while jobs.failures == 0 or (lease := await desk.jobs.claim(job_id, 60)) is None:
        await asyncio.sleep(0.05)
    jobs.away = False
    assert await working
    job = await desk.job(job_id)
    assert (job.state, job.tries) == (JobState.RUNNING, 2)
    assert await desk.jobs.renew(lease, 60, step=1, of=2, loss=1.0)


@pytest.fixture
def worker(desk: Desk, bank: ServingBank, trainer: AdapterTrainer, jobs: Shaky) -> JobLoop:
    return JobLoop(jobs, desk.profiles, bank, trainer)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("call", ["claim", "samples", "renew", "promote", "end"])
async def test_a_lost_answer_changes_nothing(
    desk: Desk, worker: JobLoop, jobs: Shaky, monkeypatch: pytest.MonkeyPatch, *, call: str, silent: bool
) -> None:
    monkeypatch.setattr("server.worker.lease.RENEW_S", 0.05)
    monkeypatch.setattr("server.worker.lease.ANSWER_S", 0.5 if silent else 4.0)
    jobs.lost, jobs.silent = {call}, silent
    job_id = await desk.submit(SAMPLES if call != "end" else [b"{"])
    assert await worker.work_once(1)
    assert jobs.failures == 1
    job, adapter = await desk.job(job_id), await desk.adapters.adapter_id(job_id.user_key)
    assert (job.state, job.tries) == (JobState.FAILED if call == "end" else JobState.SUCCEEDED, 1)
    assert (adapter or "") == job.adapter


async def test_a_job_that_takes_longer_than_it_may_fails_and_says_where_it_was(desk: Desk, worker: JobLoop) -> None:
    job_id = await desk.submit(config=encode_config(AdaptConfig(max_seconds=0)))
    assert await worker.work_once(1)
    job = await desk.job(job_id)
    assert (job.state, job.tries) == (JobState.FAILED, 1)
    assert "ran over its limit of 0 s" in job.error
    assert await desk.adapters.adapter_id(job_id.user_key) is None


async def test_training_that_shows_no_sign_of_life_loses_its_lease_and_ends_the_process(
    desk: Desk, bank: ServingBank, trainer: AdapterTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, hanging = await desk.submit(), Hanging(trainer)
    with monkeypatch.context() as patched:
        patched.setattr("server.worker.training_thread.STALL_S", 0.2)
        patched.setattr("server.worker.training_thread.RENEW_S", 0.05)
        try:
            with pytest.raises(Stalled):
                await JobLoop(desk.jobs, desk.profiles, bank, hanging).work_once(1)
        finally:
            hanging.end.set()
    job = await desk.job(job_id)
    assert (job.state, job.tries) == (JobState.QUEUED, 1)
    assert await JobLoop(desk.jobs, desk.profiles, bank, trainer).work_once(1)
    assert (await desk.job(job_id)).state is JobState.SUCCEEDED


@pytest.mark.parametrize(
    "want", [MemoryError(), RuntimeError("can't start new thread"), OSError(errno.ENOMEM, "Cannot allocate memory")]
)
async def test_a_process_that_can_make_no_connection_for_want_of_memory_ends_and_that_is_a_try(
    desk: Desk, worker: JobLoop, jobs: Shaky, want: Exception
) -> None:
    async def renew(*_: Any, **__: Any) -> bool:
        try:
            raise ConnectionError from want
        except ConnectionError as error:
            raise Unavailable("the store cannot be used now") from error

    jobs.renew = renew  # type: ignore[method-assign]
    job_id = await desk.submit()
    with pytest.raises(RuntimeError, match="can no longer reach the store"):
        await worker.work_once(1)
    job = await desk.job(job_id)
    assert (job.state, job.tries) == (JobState.QUEUED, 1)


@pytest.mark.usefixtures("short_lease")
async def test_a_job_whose_record_cannot_be_read_holds_up_no_other_and_fails_after_the_last_try(
    desk: Desk,
    worker: JobLoop,
    store: ValkeyProcess,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("server.store.queue.GRACE_MS", 0)
    broken, behind = await desk.submit(), await desk.submit()
    async with redis.from_url(store.url, decode_responses=True) as raw:
        await raw.hset(keys.job(broken), "curve", "{")
        working = asyncio.create_task(work_forever(worker.work_once))
        try:
            async with asyncio.timeout(PATIENCE_S):
                while not (await desk.job(behind)).state.ended:
                    await asyncio.sleep(0.05)
                while (state := await raw.hget(keys.job(broken), "state")) == "running":
                    await asyncio.sleep(0.05)
        finally:
            working.cancel()
    assert ((await desk.job(behind)).state, state) == (JobState.SUCCEEDED, "failed")
    said = [record.message for record in caplog.records if record.message.startswith(f"{broken}: cannot be read")]
    assert len(said) == MAX_TRIES


async def test_a_newer_job_for_another_bank_is_left_to_its_workers(desk: Desk, worker: JobLoop) -> None:
    job_id = await desk.submit()
    newer = await desk.submit(SAMPLES[:2], user=job_id.user_key, bank="00000000")
    assert not await worker.work_once(0.1)
    assert (await desk.job(job_id)).state is JobState.SUPERSEDED
    job = await desk.job(newer)
    assert (job.state, job.tries) == (JobState.QUEUED, 0)
    assert await desk.jobs.next_job("00000000", 1) == newer
