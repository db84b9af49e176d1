"""A worker's lease while the store is away, while it loses answers, and while training outlasts the lease."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bank.lookup.serving import ServingBank
from bench.rig.processes import PATIENCE_S, wait_until
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.store.jobs import MAX_TRIES, JobState, JobStore
from server.store.redis import keys
from server.store.redis.servers.connection import RedisConnection
from server.worker.loops import JobLoop
from server.worker.process import work_forever
from server.worker.training import AdapterTrainer
from tests.integration.conftest import Interrupted
from tests.support.desk import SAMPLES, Desk


def shaky(name: str) -> Any:
    """A store call that may fail, or whose answer may be lost."""
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
    """Real jobs, some of whose answers do not arrive."""

    def __init__(self, connection: RedisConnection) -> None:
        super().__init__(connection)
        self.away = False  # while true, nothing reaches the store
        self.lost = set[str]()  # calls whose next answer is lost after the store has done its work
        self.silent = False  # whether a lost answer is silence rather than an error
        self.failures = 0

    renew, claim, samples = shaky("renew"), shaky("claim"), shaky("samples")
    end, promote, release = shaky("end"), shaky("promote"), shaky("release")


@pytest.fixture
def jobs(desk: Desk) -> Shaky:
    return Shaky(desk.connection)


@pytest.fixture
def worker(desk: Desk, jobs: Shaky, trainer: AdapterTrainer, tiny_bank_folder: Path) -> JobLoop:
    return JobLoop(jobs, desk.profiles, ServingBank.open(tiny_bank_folder, trainer.manifest.embedder.id), trainer)


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lease", "loops"):
        monkeypatch.setattr(f"server.worker.{module}.LEASE_S", 0.5)
    monkeypatch.setattr("server.worker.lease.RENEW_S", 0.05)


@pytest.fixture
def slow(short_lease: None, worker: JobLoop, jobs: Shaky) -> JobLoop:
    """A worker whose store goes away at the first step, and whose training outlasts its lease."""
    leave = partial(setattr, jobs, "away", True)
    worker.trainer = Interrupted(worker.trainer, leave, lambda step: time.sleep(0.1))
    return worker


async def test_a_store_that_restarts_within_the_lease_costs_no_training(
    desk: Desk, worker: JobLoop, jobs: Shaky, store: ValkeyProcess
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
    worker.trainer = Interrupted(worker.trainer, restart, steps.append)
    job_id = await desk.submit()
    assert await worker.work_once(1)
    job = await desk.job(job_id)
    assert (job.state, job.tries, steps.count(1)) == (JobState.SUCCEEDED, 1, 1)


async def test_a_lease_that_expires_while_the_store_is_away_costs_no_try(
    desk: Desk, slow: JobLoop, jobs: Shaky, trainer: AdapterTrainer
) -> None:
    job_id = await desk.submit()
    working = asyncio.create_task(slow.work_once(1))
    while jobs.failures < 15:
        await asyncio.sleep(0.05)
    assert not working.done()  # it waits for the store, to return the job
    jobs.away = False
    assert await working
    job = await desk.job(job_id)
    assert (job.state, job.tries, job.step) == (JobState.QUEUED, 0, 0)
    slow.trainer = trainer
    assert await slow.work_once(1)
    job = await desk.job(job_id)
    assert (job.state, job.tries) == (JobState.SUCCEEDED, 1)


async def test_a_try_counts_if_another_worker_has_the_job_by_then(desk: Desk, slow: JobLoop, jobs: Shaky) -> None:
    job_id = await desk.submit()
    working = asyncio.create_task(slow.work_once(1))
    while jobs.failures == 0 or (lease := await desk.jobs.claim(job_id, 60)) is None:
        await asyncio.sleep(0.05)
    jobs.away = False
    assert await working
    job = await desk.job(job_id)
    assert (job.state, job.tries) == (JobState.RUNNING, 2)
    assert await desk.jobs.renew(lease, 60, step=1, of=2, loss=1.0)


@pytest.mark.parametrize(
    ("call", "silent"),
    [*((call, False) for call in ("claim", "samples", "renew", "promote", "end")), ("claim", True), ("renew", True)],
)
async def test_a_lost_answer_changes_nothing(
    desk: Desk, worker: JobLoop, jobs: Shaky, monkeypatch: pytest.MonkeyPatch, *, call: str, silent: bool
) -> None:
    monkeypatch.setattr("server.worker.lease.RENEW_S", 0.05)
    monkeypatch.setattr("server.worker.lease.STORE_TIMEOUT_S", 0.5 if silent else 4.0)
    jobs.lost, jobs.silent = {call}, silent
    job_id = await desk.submit(SAMPLES if call != "end" else [b"{"])
    assert await worker.work_once(1)
    assert jobs.failures == 1
    job, adapter = await desk.job(job_id), await desk.adapters.adapter_id(job_id.user_key)
    assert (job.state, job.tries) == (JobState.FAILED if call == "end" else JobState.SUCCEEDED, 1)
    assert (adapter or "") == job.adapter


@pytest.mark.usefixtures("short_lease")
async def test_an_unreadable_job_holds_up_no_other_and_fails_after_the_last_try(
    desk: Desk, worker: JobLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.store.queue.GRACE_MS", 0)
    broken, behind = await desk.submit(), await desk.submit()

    async def of_broken(call: str, *arguments: str) -> Any:
        return await desk.connection.run(lambda redis: getattr(redis, call)(keys.job(*broken), *arguments))

    await of_broken("hset", "curve", "{")
    working = asyncio.create_task(work_forever(worker.work_once))
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not (await desk.job(behind)).state.ended:
                await asyncio.sleep(0.05)
            while (state := await of_broken("hget", "state")) == b"running":
                await asyncio.sleep(0.05)
    finally:
        working.cancel()
    assert ((await desk.job(behind)).state, state) == (JobState.SUCCEEDED, b"failed")
    said = [record.message for record in caplog.records if record.message.startswith(f"{broken}: cannot be read")]
    assert len(said) == MAX_TRIES
