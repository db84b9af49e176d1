"""What every job store must do with what is asked of it, held against the real servers at hand."""

from __future__ import annotations

from server.store.jobs import KEPT_JOBS, JobId, JobState, Submission, Trained
from server.store.redis.jobs import RedisJobs
from tests.support.store_parts import BANK, LEASE_S, claimed, state, submitted


async def test_a_job_is_queued_with_its_samples_and_announced(jobs: RedisJobs, user: str) -> None:
    job = await submitted(jobs, user, "one", "two", config='{"rank":2}')
    assert (job.id.user_key, job.state, job.config, job.tries) == (user, JobState.QUEUED, '{"rank":2}', 0)
    assert job.created_ms > 0
    assert await jobs.samples(user) == [b"one", b"two"]
    assert await jobs.next_job(BANK, 1) == job.id
    assert await jobs.next_job(BANK, 0.05) is None


async def test_samples_are_replaced_or_added_and_never_too_many(jobs: RedisJobs, user: str) -> None:
    await submitted(jobs, user, "a", "b")
    await submitted(jobs, user, "c")
    assert await jobs.samples(user) == [b"c"]
    newest = (await submitted(jobs, user, "d", append=True)).id
    assert await jobs.samples(user) == [b"c", b"d"]
    one_more = Submission([b"e"], append=True, config="{}", bank=BANK)
    assert await jobs.submit(user, one_more, max_samples=2) is None
    assert await jobs.samples(user) == [b"c", b"d"]
    assert (await jobs.jobs(user))[-1].id == newest


async def test_a_newer_job_supersedes_the_older_ones_queued_or_running(jobs: RedisJobs, user: str) -> None:
    first = (await submitted(jobs, user, "one")).id
    lease = await claimed(jobs, first)
    second = (await submitted(jobs, user, "two")).id
    third = (await submitted(jobs, user, "three")).id
    assert [await state(jobs, job) for job in (first, second, third)] == [
        JobState.SUPERSEDED,
        JobState.SUPERSEDED,
        JobState.QUEUED,
    ]
    assert not await jobs.renew(lease, LEASE_S, step=1, of=2, loss=1.0)
    assert not await jobs.end(lease, Trained(JobState.REJECTED, 1.0, 1.0))
    assert await state(jobs, first) is JobState.SUPERSEDED


async def test_the_same_idempotency_key_is_the_same_job(jobs: RedisJobs, user: str) -> None:
    first = (await submitted(jobs, user, "a", idempotency_key="once")).id
    assert (await submitted(jobs, user, "other", idempotency_key="once")).id == first
    assert await jobs.samples(user) == [b"a"]
    assert (await submitted(jobs, user, idempotency_key="twice")).id != first
    assert (await submitted(jobs, user, idempotency_key="once")).id == first


async def test_only_the_newest_jobs_are_remembered(jobs: RedisJobs, user: str) -> None:
    assert await jobs.jobs(user) == []
    all_jobs = [(await submitted(jobs, user, idempotency_key=f"key {i}")).id for i in range(KEPT_JOBS + 3)]
    assert [await jobs.job(job) is not None for job in all_jobs] == [False] * 3 + [True] * KEPT_JOBS
    assert [job.id for job in await jobs.jobs(user)] == all_jobs[3:]
    assert (await submitted(jobs, user, idempotency_key="key 0")).id not in all_jobs  # forgotten, so it is new


async def test_cancelling_ends_a_job_once(jobs: RedisJobs, user: str) -> None:
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    job, ended = await jobs.cancel(lease.job.id)
    assert job is not None
    assert (job.state, ended) == (JobState.CANCELLED, True)
    again, ended = await jobs.cancel(lease.job.id)
    assert (again, ended) == (job, False)
    assert await jobs.cancel(JobId(user, 99)) == (None, False)
    assert not await jobs.renew(lease, LEASE_S, step=1, of=1, loss=None)
    assert await jobs.claim(lease.job.id, LEASE_S) is None


async def test_what_is_going_on_or_has_ended_is_not_announced(jobs: RedisJobs, user: str) -> None:
    await claimed(jobs, (await submitted(jobs, user)).id)
    assert await jobs.next_job(BANK, 0.05) is None
    await jobs.cancel((await submitted(jobs, user, "other")).id)
    assert await jobs.next_job(BANK, 0.05) is None
