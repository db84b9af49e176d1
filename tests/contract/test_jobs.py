"""Jobs: what is asked of them, who has one, how it ends, and requests that are sent again: nothing changes then."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import redis.asyncio as redis

from adapters.recipe import UserAdapterId
from server.errors import Unavailable, UserErased
from server.store.adapters import StoredAdapter
from server.store.jobs import KEPT_JOBS, MAX_TRIES, Job, JobId, JobState, JobStore, Submission, Trained, parse_job_id
from server.store.profile_record import Profile
from server.store.samples import Curve
from tests.support.store_parts import BANK, KEYS, LEASE_S, RECIPE, Fault, StoreParts, claimed, put_of, state, submitted
from tests.support.stored import LATER_MS

REJECTED = Trained(JobState.REJECTED, 1.0, 1.0)
BETTER = Trained(JobState.SUCCEEDED, 2.0, 1.5)


async def test_a_job_is_queued_with_its_samples_and_announced(jobs: JobStore, user: str) -> None:
    job = await submitted(jobs, user, "one", "two", config='{"rank":2}')
    assert (job.id.user_key, job.state, job.config, job.tries) == (user, JobState.QUEUED, '{"rank":2}', 0)
    assert job.created_ms > 0
    assert await jobs.samples(user) == [b"one", b"two"]
    assert await jobs.next_job(BANK, 1) == job.id
    assert await jobs.next_job(BANK, 0.05) is None


async def test_samples_are_replaced_or_added_and_never_too_many(jobs: JobStore, user: str) -> None:
    await submitted(jobs, user, "a", "b")
    await submitted(jobs, user, "c")
    assert await jobs.samples(user) == [b"c"]
    newest = (await submitted(jobs, user, "d", append=True)).id
    assert await jobs.samples(user) == [b"c", b"d"]
    one_more = Submission([b"e"], append=True, config="{}", bank=BANK)
    assert await jobs.submit(user, one_more, max_samples=2) is None
    assert await jobs.samples(user) == [b"c", b"d"]
    assert (await jobs.jobs(user))[-1].id == newest


async def test_a_newer_job_supersedes_the_older_ones_queued_or_running(jobs: JobStore, user: str) -> None:
    lease = await claimed(jobs, (await submitted(jobs, user, "one")).id)
    await submitted(jobs, user, "two")
    await submitted(jobs, user, "three")
    states = [JobState.SUPERSEDED, JobState.SUPERSEDED, JobState.QUEUED]
    assert [job.state for job in await jobs.jobs(user)] == states
    assert not await jobs.renew(lease, LEASE_S, step=1, of=2, loss=1.0)
    assert not await jobs.end(lease, REJECTED)
    assert [job.state for job in await jobs.jobs(user)] == states


async def test_the_same_idempotency_key_is_the_same_job(jobs: JobStore, user: str) -> None:
    first = (await submitted(jobs, user, "a", idempotency_key="once")).id
    assert (await submitted(jobs, user, "other", idempotency_key="once")).id == first
    assert await jobs.samples(user) == [b"a"]
    assert (await submitted(jobs, user, idempotency_key="twice")).id != first
    assert (await submitted(jobs, user, idempotency_key="once")).id == first


async def test_only_the_newest_jobs_are_remembered(jobs: JobStore, user: str) -> None:
    assert await jobs.jobs(user) == []
    all_jobs = [(await submitted(jobs, user, idempotency_key=f"key {i}")).id for i in range(KEPT_JOBS + 3)]
    assert [await jobs.job(job) is not None for job in all_jobs] == [False] * 3 + [True] * KEPT_JOBS
    assert [job.id for job in await jobs.jobs(user)] == all_jobs[3:]
    assert (await submitted(jobs, user, idempotency_key="key 0")).id not in all_jobs  # forgotten, so it is new


async def test_cancelling_ends_a_job_once(jobs: JobStore, user: str) -> None:
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    job, ended = await jobs.cancel(lease.job.id)
    assert (job.state, ended) == (JobState.CANCELLED, True)
    assert await jobs.cancel(lease.job.id) == (job, False)
    assert await jobs.cancel(JobId(user, 99)) == (None, False)
    assert not await jobs.renew(lease, LEASE_S, step=1, of=1, loss=None)
    assert await jobs.claim(lease.job.id, LEASE_S) is None


async def test_what_is_going_on_or_has_ended_is_not_announced(jobs: JobStore, user: str) -> None:
    await claimed(jobs, (await submitted(jobs, user)).id)
    assert await jobs.next_job(BANK, 0.05) is None
    await jobs.cancel((await submitted(jobs, user, "other")).id)
    assert await jobs.next_job(BANK, 0.05) is None


async def test_of_many_workers_one_gets_the_job(jobs: JobStore, user: str) -> None:
    job_id = (await submitted(jobs, user)).id
    leases = await asyncio.gather(*(jobs.claim(job_id, LEASE_S) for _ in range(8)))
    assert sum(lease is not None for lease in leases) == 1
    job = await jobs.job(job_id)
    assert (job.state, job.tries) == (JobState.RUNNING, 1)
    assert job.started_ms >= job.created_ms


async def test_a_curve_stays_until_another_is_given_or_the_lease_ends(jobs: JobStore, user: str) -> None:
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
    assert await jobs.end(again, REJECTED)
    assert [(job.state, job.curve) for job in await jobs.jobs(user)] == [(JobState.REJECTED, curve)]


async def test_a_silent_worker_s_job_goes_to_another_until_the_last_try(jobs: JobStore, user: str) -> None:
    job_id = (await submitted(jobs, user)).id
    leases = []
    for _ in range(MAX_TRIES):
        leases.append(await claimed(jobs, job_id, lease_s=0.001))
        await asyncio.sleep(0.01)
    assert not await jobs.renew(leases[0], LEASE_S, step=1, of=1, loss=None)
    assert await jobs.claim(job_id, LEASE_S) is None
    job = await jobs.job(job_id)
    assert (job.state, job.tries) == (JobState.FAILED, MAX_TRIES)
    assert "memory" in job.error


@pytest.mark.parametrize("counts", [True, False])
async def test_a_job_that_is_given_back_is_announced_and_taken_up_at_once(
    jobs: JobStore, user: str, *, counts: bool
) -> None:
    job_id = (await submitted(jobs, user)).id
    assert await jobs.next_job(BANK, 1) == job_id
    lease = await claimed(jobs, job_id)
    assert await jobs.renew(lease, LEASE_S, step=3, of=40, loss=1.25)
    assert await jobs.release(lease, counts=counts)
    job = await jobs.job(job_id)
    assert (job.state, job.tries, job.started_ms, job.step) == (JobState.QUEUED, int(counts), 0, 0)
    assert await jobs.next_job(BANK, 1) == job_id
    assert (await claimed(jobs, job_id)).job.tries == 1 + counts
    assert not await jobs.release(lease, counts=False)
    assert await state(jobs, job_id) is JobState.RUNNING


def made(name: str) -> StoredAdapter:
    raw = f"the bytes of {name}".encode()
    return StoredAdapter(f"{name:a<26}", RECIPE, hashlib.sha256(raw).hexdigest(), raw)


async def with_profile(parts: StoreParts, key: str) -> tuple[Profile, bytes]:
    """A user's record and its version."""
    before = await parts.profiles.read(key)
    await parts.profiles.commit(key, before.version, put_of("ada", "text", before), before.epoch)
    snapshot = await parts.profiles.read(key)
    return snapshot.profile, snapshot.version


async def test_an_adapter_replaces_the_last_in_one_step(jobs: JobStore, parts: StoreParts, user: str) -> None:
    for name in ("first", "second"):
        record = await with_profile(parts, user)
        lease = await claimed(jobs, (await submitted(jobs, user, name)).id)
        assert await jobs.promote(lease, BETTER, *record, made(name))
        job = await jobs.job(lease.job.id)
        assert (job.state, job.adapter, job.before, job.after) == (JobState.SUCCEEDED, made(name).id, 2.0, 1.5)
    assert await parts.adapters.adapter(UserAdapterId(user, made("second").id)) == made("second")
    assert await parts.adapters.adapter(UserAdapterId(user, made("first").id)) is None
    assert await parts.adapters.adapter_id(user) == made("second").id


async def test_nothing_is_promoted_for_another_record_lease_or_bank(
    jobs: JobStore, parts: StoreParts, user: str
) -> None:
    profile, version = await with_profile(parts, user)
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    other = replace(made("a"), recipe="mta3:00000000:shared:c")
    assert not await jobs.promote(lease, BETTER, profile, b"another version", made("a"))
    assert not await jobs.promote(replace(lease, token="stolen"), BETTER, profile, version, made("a"))
    assert not await jobs.promote(lease, BETTER, profile, version, other)
    assert await parts.adapters.adapter(UserAdapterId(user, made("a").id)) is None
    assert await state(jobs, lease.job.id) is JobState.RUNNING
    assert await jobs.promote(lease, BETTER, profile, version, made("a"))


async def test_nothing_is_promoted_for_a_user_erased_and_made_again(
    jobs: JobStore, parts: StoreParts, user: str
) -> None:
    await with_profile(parts, user)
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    await parts.profiles.erase(user, LATER_MS, 0)
    assert not await jobs.promote(lease, BETTER, *await with_profile(parts, user), made("a"))
    assert await parts.adapters.adapter_id(user) is None
    assert await parts.adapters.adapted() == {}


async def test_users_are_listed_by_the_bank_of_their_adapter(jobs: JobStore, parts: StoreParts) -> None:
    users, adapters = [KEYS.key(f"listed-{n}") for n in range(5)], parts.adapters
    for user in users:
        record = await with_profile(parts, user)
        lease = await claimed(jobs, (await submitted(jobs, user)).id)
        assert await jobs.promote(lease, BETTER, *record, made("a"))
    assert await adapters.adapted() == {BANK: 5}
    assert {user async for user in adapters.adapted_users(BANK)} == set(users)
    await adapters.remove_adapted(users[0], except_bank=BANK)
    await adapters.remove_adapted(users[1])
    assert await adapters.adapted() == {BANK: 4}


async def ended(parts: StoreParts, job: Job) -> bool:
    return await parts.jobs.end(await claimed(parts.jobs, job.id), REJECTED)


async def cancelled(parts: StoreParts, job: Job) -> bool:
    return (await parts.jobs.cancel(job.id))[1]


async def test_a_submission_may_be_repeated_while_its_job_goes_well(jobs: JobStore, user: str) -> None:
    first = await submitted(jobs, user, append=True)
    assert (await submitted(jobs, user, append=True)).id == first.id
    assert await jobs.samples(user) == [b"a"]
    lease = await claimed(jobs, first.id)
    assert (await submitted(jobs, user, append=True)).id == first.id
    assert await jobs.end(lease, Trained(JobState.FAILED, error="for a reason"))
    second = await submitted(jobs, user, append=True)
    assert second.id.number == first.id.number + 1  # whoever asks again after a failure wants another try
    assert await jobs.samples(user) == [b"a"]  # equal samples are kept once
    await submitted(jobs, user, "b", append=True)
    assert await jobs.samples(user) == [b"a", b"b"]
    assert (await submitted(jobs, user, append=True)).id.number == first.id.number + 3


async def test_a_job_stays_in_the_trace_of_its_first_request(jobs: JobStore, user: str) -> None:
    first = await submitted(jobs, user, traceparent="00-1-2-01")
    again = await submitted(jobs, user, traceparent="00-3-4-01")
    assert (again.id, again.traceparent) == (first.id, "00-1-2-01")
    assert (await submitted(jobs, user, "b")).traceparent == ""


@pytest.mark.parametrize("fault", [Fault.LOST_ANSWER, Fault.TWICE])
@pytest.mark.parametrize("append", [False, True])
async def test_a_submission_whose_answer_was_lost_is_one_job(
    parts: StoreParts, user: str, fault: Fault, *, append: bool
) -> None:
    parts.connection.fail(fault, after_writes=1)
    try:
        await submitted(parts.jobs, user, append=append)
    except Unavailable:
        assert fault is Fault.LOST_ANSWER
    job = await submitted(parts.jobs, user, append=append)
    assert await parts.jobs.jobs(user) == [job]
    assert await parts.jobs.samples(user) == [b"a"]


@pytest.mark.parametrize(("end", "after_writes"), [(ended, 1), (cancelled, 0)])
async def test_an_ending_whose_answer_was_lost_is_known_as_ones_own(
    parts: StoreParts, user: str, end: Callable[..., object], after_writes: int
) -> None:
    job = await submitted(parts.jobs, user)
    parts.connection.fail(Fault.TWICE, after_writes=after_writes)
    assert await end(parts, job)


async def test_samples_of_an_erased_user_are_refused(parts: StoreParts, user: str) -> None:
    epoch = await parts.profiles.epoch(user)
    await parts.profiles.erase(user, LATER_MS, 0)
    with pytest.raises(UserErased):
        await submitted(parts.jobs, user, epoch=epoch)
    assert await parts.jobs.samples(user) == []
    assert (await submitted(parts.jobs, user, epoch=await parts.profiles.epoch(user))).state is JobState.QUEUED


async def test_an_erasure_before_the_new_job_is_read_back_is_told(
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
