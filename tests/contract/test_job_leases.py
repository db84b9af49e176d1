"""Of all workers one has a job, for as long as it is heard of."""

from __future__ import annotations

import asyncio

import pytest

from server.store.jobs import MAX_TRIES, JobState, Trained
from server.store.redis.jobs import RedisJobs
from server.store.samples import Curve
from tests.support.store_parts import BANK, LEASE_S, claimed, state, submitted


async def test_of_many_workers_one_gets_the_job(jobs: RedisJobs, user: str) -> None:
    job_id = (await submitted(jobs, user)).id
    leases = await asyncio.gather(*(jobs.claim(job_id, LEASE_S) for _ in range(8)))
    assert sum(lease is not None for lease in leases) == 1
    job = await jobs.job(job_id)
    assert job is not None
    assert (job.state, job.tries) == (JobState.RUNNING, 1)
    assert job.started_ms >= job.created_ms


async def test_a_curve_stays_as_it_is_until_another_is_given_and_ends_with_the_lease(
    jobs: RedisJobs, user: str
) -> None:
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    curve = Curve("fold 1 of 2", ((1, 2.5), (2, 1.25)), ((0, 2.75),))
    for number, given, then in ((1, None, Curve()), (2, curve, curve), (3, None, curve)):
        assert await jobs.renew(lease, LEASE_S, step=number, of=40, loss=1 / number, curve=given)
        [job] = await jobs.jobs(user)
        assert (job.step, job.of, job.loss, job.curve) == (number, 40, 1 / number, then)
        assert job == await jobs.job(job.id)
    assert await jobs.release(lease, counts=False)
    assert not await jobs.renew(lease, LEASE_S, step=4, of=40, loss=1.0, curve=curve)
    assert [job.curve for job in await jobs.jobs(user)] == [Curve()]
    again = await claimed(jobs, job.id)
    assert await jobs.renew(again, LEASE_S, step=2, of=40, loss=1.25, curve=curve)
    assert await jobs.end(again, Trained(JobState.REJECTED, 2.75, 2.75))
    assert [(job.state, job.curve) for job in await jobs.jobs(user)] == [(JobState.REJECTED, curve)]


async def test_a_job_whose_worker_is_silent_is_given_to_another_and_fails_after_the_last_try(
    jobs: RedisJobs, user: str
) -> None:
    job_id = (await submitted(jobs, user)).id
    leases = []
    for _ in range(MAX_TRIES):
        leases.append(await claimed(jobs, job_id, lease_s=0.001))
        await asyncio.sleep(0.01)
    assert not await jobs.renew(leases[0], LEASE_S, step=1, of=1, loss=None)
    assert await jobs.claim(job_id, LEASE_S) is None
    job = await jobs.job(job_id)
    assert job is not None
    assert (job.state, job.tries) == (JobState.FAILED, MAX_TRIES)
    assert "memory" in job.error


@pytest.mark.parametrize("counts", [True, False])
async def test_a_job_that_is_given_back_is_announced_and_taken_up_at_once(
    jobs: RedisJobs, user: str, *, counts: bool
) -> None:
    job_id = (await submitted(jobs, user)).id
    assert await jobs.next_job(BANK, 1) == job_id
    lease = await claimed(jobs, job_id)
    assert await jobs.renew(lease, LEASE_S, step=3, of=40, loss=1.25)
    assert await jobs.release(lease, counts=counts)
    job = await jobs.job(lease.job.id)
    assert job is not None
    assert (job.state, job.tries, job.started_ms, job.step) == (JobState.QUEUED, int(counts), 0, 0)
    assert await jobs.next_job(BANK, 1) == lease.job.id
    again = await claimed(jobs, lease.job.id)
    assert again.job.tries == 1 + counts
    assert not await jobs.release(lease, counts=False)
    assert await state(jobs, lease.job.id) is JobState.RUNNING
