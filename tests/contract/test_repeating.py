"""Requests that are sent again, by a client or on the way to the store, because an answer was lost: nothing changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import redis.asyncio as redis

from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable, UserErased
from server.store.jobs import Job, JobId, JobState, Trained, parse_job_id
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
    assert second.id.number == first.id.number + 1  # whoever asks again after a failure wants another try
    assert await jobs.samples(user) == [b"a"]  # equal samples are kept once
    await submitted(jobs, user, "b", append=True)
    assert await jobs.samples(user) == [b"a", b"b"]
    assert (await submitted(jobs, user, append=True)).id.number == first.id.number + 3


async def test_a_job_stays_in_the_trace_of_its_first_request(jobs: RedisJobs, user: str) -> None:
    first = await submitted(jobs, user, traceparent="00-1-2-01")
    again = await submitted(jobs, user, traceparent="00-3-4-01")
    assert (again.id, again.traceparent) == (first.id, "00-1-2-01")
    assert (await submitted(jobs, user, "b")).traceparent == ""


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
        assert await parts.jobs.jobs(user) == [job]
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
    assert (await submitted(parts.jobs, user, epoch=await parts.profiles.epoch(user))).state is JobState.QUEUED


async def test_who_is_erased_before_their_new_job_is_read_back_is_told_so(
    parts: StoreParts, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = parts.jobs.job

    async def erased_before(job_id: JobId) -> Job | None:
        assert await parts.profiles.erase(user, LATER_MS, 0)
        return await read(job_id)

    monkeypatch.setattr(parts.jobs, "job", erased_before)
    with pytest.raises(UserErased):
        await submitted(parts.jobs, user)


async def test_a_job_id_is_not_used_again_though_nothing_remembers_it(
    parts: StoreParts, user: str, raw: redis.Redis
) -> None:
    given = set()
    for _ in range(3):
        jobs = [(await submitted(parts.jobs, user, text)).id for text in "ab"]
        assert jobs[1].number == jobs[0].number + 1
        assert [parse_job_id(str(job)) for job in jobs] == jobs
        assert given.isdisjoint(jobs)
        given.update(jobs)
        await parts.profiles.erase(user, LATER_MS, 0)
        await raw.delete(f"mta:{{{user}}}:epoch")  # its time is over
