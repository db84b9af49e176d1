"""What every job store must do, held against the real servers at hand."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest
import redis.asyncio as redis

from bench.rig.valkey import ValkeyProcess
from server.store.adapters import StoredAdapter
from server.store.jobs import (
    KEPT_JOBS,
    MAX_TRIES,
    JobId,
    JobState,
    Lease,
    Submission,
    Trained,
    parse_job_id,
)
from server.store.profiles import Change, Profile
from server.store.redis.adapters import RedisAdapters
from server.store.redis.connection import RedisConnection
from server.store.redis.jobs import RedisJobs
from server.store.redis.profiles import RedisProfiles
from server.store.user_key import UserKeys

BANK = "9f2c41d0"
RECIPE = f"mta1:{BANK}:shared:c"
LEASE_S = 30.0
_numbers = itertools.count()


@pytest.fixture
async def connection(server: ValkeyProcess) -> AsyncIterator[RedisConnection]:
    """To a server that holds nothing."""
    async with redis.from_url(server.url) as raw:
        await raw.flushall()
    opened = RedisConnection(server.url)
    await opened.check()
    yield opened
    await opened.close()


@pytest.fixture
def jobs(connection: RedisConnection) -> RedisJobs:
    return RedisJobs(connection)


@pytest.fixture
def user() -> str:
    return UserKeys("a secret for tests only", "tests").key(f"user-{next(_numbers)}")


def submission(*samples: str, append: bool = False, key: str = "") -> Submission:
    return Submission(
        [sample.encode() for sample in samples or ("a", "b")], append, '{"kind":"core"}', BANK, idempotency_key=key
    )


async def submitted(jobs: RedisJobs, user: str, *samples: str, append: bool = False, key: str = "") -> JobId:
    job = await jobs.submit(user, submission(*samples, append=append, key=key), 100)
    assert job is not None
    return job.id


async def claimed(jobs: RedisJobs, job_id: JobId, lease_s: float = LEASE_S) -> Lease:
    lease = await jobs.claim(job_id, lease_s)
    assert lease is not None
    return lease


async def state(jobs: RedisJobs, job_id: JobId) -> JobState:
    job = await jobs.job(job_id)
    assert job is not None
    return job.state


def made(name: str) -> StoredAdapter:
    raw = f"the bytes of {name}".encode()
    return StoredAdapter(name, RECIPE, hashlib.sha256(raw).hexdigest(), raw)


async def with_profile(connection: RedisConnection, user: str) -> tuple[Profile, bytes]:
    """A user's record and its version."""
    profiles = RedisProfiles(connection)
    profile = Profile("ada", 0, 1, "3887c9b9af8fe702", np.ones(8, "f4"))
    before = await profiles.read(user)
    await profiles.commit(user, before.version, Change(profile, {}, {}, ()), before.epoch)
    snapshot = await profiles.read(user)
    assert snapshot.profile is not None
    return snapshot.profile, snapshot.version


async def test_a_job_is_queued_with_its_samples_and_announced(jobs: RedisJobs, user: str) -> None:
    job = await jobs.submit(user, submission("one", "two"), 100)
    assert job is not None
    assert (job.id, job.state, job.config, job.tries) == (JobId(user, 1), JobState.QUEUED, '{"kind":"core"}', 0)
    assert job.created_ms > 0
    assert await jobs.samples(user) == [b"one", b"two"]
    assert await jobs.next_job(BANK, "w", 1) == job.id
    assert await jobs.next_job(BANK, "w", 0.05) is None


async def test_samples_are_replaced_or_added_and_never_too_many(jobs: RedisJobs, user: str) -> None:
    await submitted(jobs, user, "a", "b")
    await submitted(jobs, user, "c")
    assert await jobs.samples(user) == [b"c"]
    await submitted(jobs, user, "d", append=True)
    assert await jobs.samples(user) == [b"c", b"d"]
    assert await jobs.submit(user, submission("e", append=True), 2) is None
    assert await jobs.samples(user) == [b"c", b"d"]
    assert await jobs.job(JobId(user, 4)) is None


async def test_a_newer_job_supersedes_the_older_ones_queued_or_running(jobs: RedisJobs, user: str) -> None:
    first = await submitted(jobs, user, "one")
    lease = await claimed(jobs, first)
    second = await submitted(jobs, user, "two")
    third = await submitted(jobs, user, "three")
    assert [await state(jobs, job) for job in (first, second, third)] == [
        JobState.SUPERSEDED,
        JobState.SUPERSEDED,
        JobState.QUEUED,
    ]
    assert not await jobs.renew(lease, LEASE_S, step=1, of=2, loss=1.0)
    assert not await jobs.end(lease, Trained(JobState.REJECTED, 1.0, 1.0))
    assert await state(jobs, first) is JobState.SUPERSEDED


async def test_the_same_idempotency_key_is_the_same_job(jobs: RedisJobs, user: str) -> None:
    first = await submitted(jobs, user, "a", key="once")
    assert await submitted(jobs, user, "other", key="once") == first
    assert await jobs.samples(user) == [b"a"]
    assert await submitted(jobs, user, key="twice") != first
    assert await submitted(jobs, user, key="once") == first


async def test_only_the_newest_jobs_are_remembered(jobs: RedisJobs, user: str) -> None:
    all_jobs = [await submitted(jobs, user, key=f"key {i}") for i in range(KEPT_JOBS + 3)]
    assert [await jobs.job(job) is not None for job in all_jobs] == [False] * 3 + [True] * KEPT_JOBS
    assert await submitted(jobs, user, key="key 0") not in all_jobs  # forgotten, so it is new


async def test_of_many_workers_one_gets_the_job(jobs: RedisJobs, user: str) -> None:
    job_id = await submitted(jobs, user)
    leases = await asyncio.gather(*(jobs.claim(job_id, LEASE_S) for _ in range(8)))
    assert sum(lease is not None for lease in leases) == 1
    job = await jobs.job(job_id)
    assert job is not None
    assert (job.state, job.tries) == (JobState.RUNNING, 1)
    assert job.started_ms >= job.created_ms


async def test_progress_is_noted_while_the_lease_holds(jobs: RedisJobs, user: str) -> None:
    lease = await claimed(jobs, await submitted(jobs, user))
    assert await jobs.renew(lease, LEASE_S, step=3, of=40, loss=1.25)
    job = await jobs.job(lease.job.id)
    assert job is not None
    assert (job.step, job.of, job.loss) == (3, 40, 1.25)


async def test_a_job_whose_worker_is_silent_is_given_to_another_and_fails_after_the_last_try(
    jobs: RedisJobs, user: str
) -> None:
    job_id = await submitted(jobs, user)
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
    job_id = await submitted(jobs, user)
    assert await jobs.next_job(BANK, "w", 1) == job_id
    lease = await claimed(jobs, job_id)
    assert await jobs.renew(lease, LEASE_S, step=3, of=40, loss=1.25)
    assert await jobs.release(lease, counts=counts)
    job = await jobs.job(lease.job.id)
    assert job is not None
    assert (job.state, job.tries, job.started_ms, job.step) == (JobState.QUEUED, int(counts), 0, 0)
    assert await jobs.next_job(BANK, "w", 1) == lease.job.id
    again = await claimed(jobs, lease.job.id)
    assert again.job.tries == 1 + counts
    assert not await jobs.release(lease, counts=False)
    assert await state(jobs, lease.job.id) is JobState.RUNNING


async def test_cancelling_ends_a_job_once(jobs: RedisJobs, user: str) -> None:
    lease = await claimed(jobs, await submitted(jobs, user))
    job, ended = await jobs.cancel(lease.job.id)
    assert job is not None
    assert (job.state, ended) == (JobState.CANCELLED, True)
    again, ended = await jobs.cancel(lease.job.id)
    assert (again, ended) == (job, False)
    assert await jobs.cancel(JobId(user, 99)) == (None, False)
    assert not await jobs.renew(lease, LEASE_S, step=1, of=1, loss=None)
    assert await jobs.claim(lease.job.id, LEASE_S) is None


async def test_a_promoted_adapter_takes_the_place_of_the_last_in_one_step(
    jobs: RedisJobs, connection: RedisConnection, user: str
) -> None:
    for name in ("first", "second"):
        profile, version = await with_profile(connection, user)
        lease = await claimed(jobs, await submitted(jobs, user, name))
        assert await jobs.promote(lease, Trained(JobState.SUCCEEDED, 2.0, 1.5), profile, version, made(name))
        job = await jobs.job(lease.job.id)
        assert job is not None
        assert (job.state, job.adapter, job.before, job.after) == (JobState.SUCCEEDED, name, 2.0, 1.5)
    adapters = RedisAdapters(connection)
    assert await adapters.adapter(user, "second") == made("second")
    assert await adapters.adapter(user, "first") is None
    assert await adapters.adapter_id(user) == "second"


async def test_nothing_is_promoted_when_the_record_changed_or_the_lease_is_lost(
    jobs: RedisJobs, connection: RedisConnection, user: str
) -> None:
    profile, version = await with_profile(connection, user)
    lease = await claimed(jobs, await submitted(jobs, user))
    trained = Trained(JobState.SUCCEEDED, 2.0, 1.5)
    assert not await jobs.promote(lease, trained, profile, b"another version", made("a"))
    assert not await jobs.promote(replace(lease, token="stolen"), trained, profile, version, made("a"))
    assert await RedisAdapters(connection).adapter(user, "a") is None
    assert await state(jobs, lease.job.id) is JobState.RUNNING
    assert await jobs.promote(lease, trained, profile, version, made("a"))


async def test_an_adapter_of_another_bank_than_the_jobs_is_not_promoted(
    jobs: RedisJobs, connection: RedisConnection, user: str
) -> None:
    profile, version = await with_profile(connection, user)
    lease = await claimed(jobs, await submitted(jobs, user))
    other = replace(made("a"), recipe="mta1:00000000:shared:c")
    assert not await jobs.promote(lease, Trained(JobState.SUCCEEDED, 2.0, 1.5), profile, version, other)
    assert await state(jobs, lease.job.id) is JobState.RUNNING


async def test_nothing_is_promoted_for_a_user_who_was_erased_and_made_again(
    jobs: RedisJobs, connection: RedisConnection, user: str
) -> None:
    await with_profile(connection, user)
    lease = await claimed(jobs, await submitted(jobs, user))
    await RedisProfiles(connection).erase(user, 1 << 52, 0)
    profile, version = await with_profile(connection, user)
    assert not await jobs.promote(lease, Trained(JobState.SUCCEEDED, 2.0, 1.5), profile, version, made("a"))
    adapters = RedisAdapters(connection)
    assert await adapters.adapter_id(user) is None
    assert set((await adapters.adapted()).values()) <= {0}


async def test_a_job_that_nobody_was_told_of_is_found(
    jobs: RedisJobs, user: str, server: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.store.redis.queue.GRACE_MS", 0)
    job_id = await submitted(jobs, user)
    async with redis.from_url(server.url) as raw:
        await raw.delete(f"mta:{{jobs:{BANK}}}:calls")
    jobs = RedisJobs(jobs._connection)
    assert await jobs.overdue(BANK) == [job_id]
    assert await jobs.next_job(BANK, "w", 1) == job_id


async def test_what_is_going_on_or_has_ended_is_not_announced(
    jobs: RedisJobs, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.store.redis.queue.GRACE_MS", 0)
    await claimed(jobs, await submitted(jobs, user))
    await jobs.next_job(BANK, "w", 1)
    assert await jobs.overdue(BANK) == []
    await submitted(jobs, user)
    await jobs.cancel(JobId(user, 2))
    await jobs.next_job(BANK, "w", 1)
    assert await jobs.overdue(BANK) == []


@pytest.mark.parametrize("text", ["", "a", "a.", ".1", "a.01", "a.-1", "a.1.2", "a.x", "a/b.1", "a.²"])
def test_what_is_no_job_id_is_none(text: str) -> None:
    assert parse_job_id(text) is None


async def test_users_are_listed_by_the_bank_of_their_adapter_until_they_are_forgotten(
    jobs: RedisJobs, connection: RedisConnection
) -> None:
    users = [UserKeys("a secret for tests only", "tests").key(f"listed-{n}") for n in range(5)]
    for user in users:
        profile, version = await with_profile(connection, user)
        lease = await claimed(jobs, await submitted(jobs, user))
        assert await jobs.promote(lease, Trained(JobState.SUCCEEDED, 2.0, 1.5), profile, version, made("a"))
    adapters = RedisAdapters(connection)
    assert await adapters.adapted() == {BANK: 5}
    assert {user async for user in adapters.adapted_users(BANK)} == set(users)
    await adapters.forget_adapted(users[0], but=BANK)
    await adapters.forget_adapted(users[1])
    assert await adapters.adapted() == {BANK: 4}
