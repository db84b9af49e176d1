"""Requests that are sent again, by a client or on the way to the store, because an answer was lost: nothing changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis.asyncio as redis

from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable, UserErased
from server.store.jobs import KEPT_JOBS, Job, JobId, JobState, Trained
from server.store.redis.jobs import RedisJobs
from tests.support.faults import Fault
from tests.support.store_parts import StoreParts, submitted

LATER_MS = 1 << 52


async def test_a_submission_may_be_repeated_while_its_job_is_the_newest_and_goes_well(
    jobs: RedisJobs, user: str
) -> None:
    first = await submitted(jobs, user, append=True)
    assert (await submitted(jobs, user, append=True)).id == first.id
    assert await jobs.samples(user) == [b"a"]
    lease = await jobs.claim(first.id, 30)
    assert lease is not None
    assert (await submitted(jobs, user, append=True)).id == first.id
    assert await jobs.end(lease, Trained(JobState.FAILED, error="for a reason"))
    second = await submitted(jobs, user, append=True)
    assert second.id.number == 2  # whoever asks again after a failure wants another try
    assert await jobs.samples(user) == [b"a"]  # equal samples are kept once
    await submitted(jobs, user, "b", append=True)
    assert await jobs.samples(user) == [b"a", b"b"]
    assert (await submitted(jobs, user, append=True)).id.number == 4


async def test_a_job_stays_in_the_trace_of_its_first_request(jobs: RedisJobs, user: str) -> None:
    first = await submitted(jobs, user, traceparent="00-1-2-01")
    again = await submitted(jobs, user, traceparent="00-3-4-01")
    assert (again.id, again.traceparent) == (first.id, "00-1-2-01")
    assert (await submitted(jobs, user, "b")).traceparent == ""


async def test_idempotency_keys_are_forgotten_with_their_jobs(jobs: RedisJobs, user: str, raw: redis.Redis) -> None:
    for number in range(KEPT_JOBS + 2):
        await submitted(jobs, user, idempotency_key=f"key {number}")
    assert await raw.hkeys(f"mta:{{{user}}}:jobs") == [b"last"]
    kept = [name async for name in raw.scan_iter(f"mta:{{{user}}}:job:*")]
    assert len(kept) == KEPT_JOBS


@pytest.mark.parametrize("fault", [Fault.LOST_ANSWER, Fault.TWICE])
@pytest.mark.parametrize("append", [False, True])
async def test_a_submission_whose_answer_is_lost_is_one_job_when_it_is_sent_again(
    server: ValkeyProcess, raw: redis.Redis, user: str, fault: Fault, *, append: bool
) -> None:
    async with StoreParts.opened(server.url) as parts:
        parts.connection.fail(fault, after_writes=1)
        try:
            await submitted(parts.jobs, user, append=append)
        except Unavailable:
            assert fault is Fault.LOST_ANSWER
        job = await submitted(parts.jobs, user, append=append)
        assert job.id == JobId(user, 1)
        assert await parts.jobs.samples(user) == [b"a"]


async def ended(parts: StoreParts, job: Job) -> None:
    lease = await parts.jobs.claim(job.id, 30)
    assert lease is not None
    assert await parts.jobs.end(lease, Trained(JobState.REJECTED, 1.0, 1.0))


async def cancelled(parts: StoreParts, job: Job) -> None:
    found, by_this = await parts.jobs.cancel(job.id)
    assert found is not None
    assert by_this


@pytest.mark.parametrize("end", [ended, cancelled])
async def test_an_ending_whose_answer_is_lost_and_that_is_sent_again_is_known_as_ones_own(
    server: ValkeyProcess, raw: redis.Redis, user: str, end: Callable[..., object]
) -> None:
    async with StoreParts.opened(server.url) as parts:
        job = await submitted(parts.jobs, user)
        parts.connection.fail(Fault.TWICE, after_writes=1 if end is ended else 0)
        await end(parts, job)  # type: ignore[misc]


async def test_samples_of_an_erased_user_are_refused(parts: StoreParts, user: str) -> None:
    epoch = await parts.profiles.epoch(user)
    await parts.profiles.erase(user, LATER_MS, 0)
    with pytest.raises(UserErased):
        await submitted(parts.jobs, user, epoch=epoch)
    assert await parts.jobs.samples(user) == []
    assert (await submitted(parts.jobs, user, epoch=await parts.profiles.epoch(user))).id.number == 1
