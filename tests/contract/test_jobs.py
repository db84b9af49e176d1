"""Jobs: what is asked of them, who has one, how it ends, requests sent again, and those that a change of bank makes."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest
from redis.asyncio import Redis

from adapters.recipe import UserAdapterId
from bank.errors import BankError
from server.errors import Unavailable, UserErased
from server.store.adapters import AdapterStore, AdapterVersion, StoredAdapter
from server.store.feedback import Feedback
from server.store.jobs import (
    KEPT_JOBS,
    MAX_TRIES,
    Job,
    JobId,
    JobState,
    JobStore,
    Lease,
    Submission,
    Trained,
    parse_job_id,
)
from server.store.profile_record import AdapterNote
from server.store.redis import keys
from server.store.samples import Curve, JobBudget, Sample, decode_config
from server.store.tenants.access_keys import KeyRing, Scope, access_key
from server.store.tenants.user_key import Tenants
from server.worker.readapting import Readapting, ReadaptTally, ServedBanks
from tests.support import store_parts as known
from tests.support.store_parts import BANK, KEYS, LEASE_S, Fault, StoreParts, WorkerSteps, claimed, put_of, submitted

REJECTED = Trained(JobState.REJECTED, 1.0, 1.0)
BETTER = Trained(JobState.SUCCEEDED, 2.0, 1.5)


async def test_job_is_queued_and_samples_are_replaced_or_appended(jobs: JobStore, user: str) -> None:
    job = await submitted(jobs, user, "a", "b", config='{"rank":2}')
    assert (job.id.user_key, job.state, job.config, job.tries) == (user, JobState.QUEUED, '{"rank":2}', 0)
    assert job.created_ms > 0
    assert await jobs.samples(user) == [b"a", b"b"]
    assert await jobs.next_job(BANK, 1) == job.id
    assert await jobs.next_job(BANK, 0.05) is None
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
    assert not await jobs.renew(lease, LEASE_S, step=1, of=2)
    assert not await jobs.end(lease, REJECTED)
    assert [job.state for job in await jobs.jobs(user)] == states


async def test_an_ended_job_stays_with_its_figures(jobs: JobStore, user: str, raw: Redis) -> None:
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    assert await jobs.end(lease, REJECTED)
    ended = await jobs.job(lease.job.id)
    assert ended is not None
    assert (ended.before, ended.after, ended.served) == (REJECTED.before, REJECTED.after, REJECTED.served)
    assert await raw.ttl(keys.job(*lease.job.id)) == -1


async def test_remembered_idempotency_key_returns_the_same_job(jobs: JobStore, user: str) -> None:
    assert await jobs.jobs(user) == []
    all_jobs = [(await submitted(jobs, user, idempotency_key=f"key {i}")).id for i in range(KEPT_JOBS + 3)]
    assert len(set(all_jobs)) == KEPT_JOBS + 3
    assert [await jobs.job(job) is not None for job in all_jobs] == [False] * 3 + [True] * KEPT_JOBS
    assert [job.id for job in await jobs.jobs(user)] == all_jobs[3:]
    for number in (3, 4, KEPT_JOBS + 2):
        assert (await submitted(jobs, user, "other", idempotency_key=f"key {number}")).id == all_jobs[number]
    assert await jobs.samples(user) == [b"a"]
    assert (await submitted(jobs, user, idempotency_key="key 0")).id not in all_jobs


async def test_background_job_replaces_no_open_job_of_its_bank(jobs: JobStore, user: str) -> None:
    asked = await submitted(jobs, user)
    unasked = Submission([], append=True, config="{}", bank=BANK, background=True)
    assert await jobs.submit(user, unasked, 100) is None
    assert await jobs.jobs(user) == [asked]
    await jobs.cancel(asked.id)
    assert (await submitted(jobs, user, background=True)).id != asked.id


async def test_find_duplicate_returns_the_job_and_stores_nothing(jobs: JobStore, user: str) -> None:
    repeated, new = (Submission([text], append=False, config="{}", bank=BANK) for text in (b"a", b"b"))
    assert await jobs.find_duplicate(user, repeated) is None
    job = await submitted(jobs, user, "a")
    found = await jobs.find_duplicate(user, repeated)
    assert found is not None
    assert (found, found.is_new, job.is_new) == (job, False, True)
    assert await jobs.find_duplicate(user, new) is None
    assert (await jobs.samples(user), await jobs.jobs(user)) == ([b"a"], [job])


async def test_cancelling_ends_a_job_once(jobs: JobStore, user: str) -> None:
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    job, ended = await jobs.cancel(lease.job.id)
    assert (job.state, ended) == (JobState.CANCELLED, True)
    assert await jobs.cancel(lease.job.id) == (job, False)
    assert await jobs.cancel(JobId(user, 99)) == (None, False)
    assert not await jobs.renew(lease, LEASE_S, step=1, of=1)
    assert await jobs.claim(lease.job.id, LEASE_S) is None
    await jobs.cancel((await submitted(jobs, user, "other")).id)
    assert await jobs.next_job(BANK, 0.05) is None


async def test_a_curve_stays_until_another_is_given_or_the_lease_ends(jobs: JobStore, user: str) -> None:
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    curve = Curve("fold 1 of 2", ((1, 2.5), (2, 1.25)), ((0, 2.75),))
    for number, given, then in ((1, None, Curve()), (2, curve, curve), (3, None, curve)):
        assert await jobs.renew(lease, LEASE_S, step=number, of=40, curve=given)
        [job] = await jobs.jobs(user)
        assert (job.step, job.of, job.curve) == (number, 40, then)
        assert job == await jobs.job(job.id)
    assert await jobs.release(lease, counts=False)
    assert not await jobs.renew(lease, LEASE_S, step=4, of=40, curve=curve)
    assert [job.curve for job in await jobs.jobs(user)] == [Curve()]
    again = await claimed(jobs, job.id)
    assert await jobs.renew(again, LEASE_S, step=2, of=40, curve=curve)
    assert await jobs.end(again, REJECTED)
    assert [(job.state, job.curve) for job in await jobs.jobs(user)] == [(JobState.REJECTED, curve)]


async def test_job_of_a_silent_worker_is_reclaimed_until_last_try(jobs: JobStore, user: str) -> None:
    job_id = (await submitted(jobs, user)).id
    leases = []
    for _ in range(MAX_TRIES):
        leases.append(await claimed(jobs, job_id, lease_s=0.001))
        await asyncio.sleep(0.01)
    starts = [lease.job.started_ms for lease in leases]
    assert starts == sorted(set(starts))  # what comes before the last start is trained on
    assert not await jobs.renew(leases[0], LEASE_S, step=1, of=1)
    assert await jobs.claim(job_id, LEASE_S) is None
    job = await jobs.job(job_id)
    assert (job.state, job.tries) == (JobState.FAILED, MAX_TRIES)
    assert "memory" in job.error


@pytest.mark.parametrize("counts", [True, False])
async def test_one_worker_gets_a_job_and_another_what_it_gives_back(jobs: JobStore, user: str, *, counts: bool) -> None:
    job_id = (await submitted(jobs, user)).id
    assert await jobs.next_job(BANK, 1) == job_id
    leases = await asyncio.gather(*(jobs.claim(job_id, LEASE_S) for _ in range(8)))
    [lease] = filter(None, leases)
    assert (lease.job.state, lease.job.tries) == (JobState.RUNNING, 1)
    assert lease.job.started_ms >= lease.job.created_ms
    assert await jobs.renew(lease, LEASE_S, step=3, of=40)
    assert await jobs.release(lease, counts=counts)
    job = await jobs.job(job_id)
    assert (job.state, job.tries, job.started_ms, job.step) == (JobState.QUEUED, int(counts), 0, 0)
    assert await jobs.next_job(BANK, 1) == job_id
    assert (await claimed(jobs, job_id)).job.tries == 1 + counts
    assert not await jobs.release(lease, counts=False)
    assert (await jobs.job(job_id)).state is JobState.RUNNING


def made(name: str) -> StoredAdapter:
    raw = f"the bytes of {name}".encode()
    return StoredAdapter(f"{name:a<26}", known.RECIPE, hashlib.sha256(raw).hexdigest(), raw)


async def promoted(jobs: JobStore, lease: Lease, name: str, **changes: str) -> bool:
    stored = made(name)
    note = AdapterNote(stored.id, stored.recipe, len(stored.raw), 1)
    version = AdapterVersion(replace(note, **changes), stored.sha256)
    return await jobs.promote(lease, BETTER, version, stored.raw, at_most=1)


async def put_profile(parts: StoreParts, key: str) -> None:
    epoch, before = await parts.profiles.begin(key), await parts.profiles.read(key)
    await parts.profiles.commit(key, before.version, put_of("ada", "text", before), epoch)


async def test_an_adapter_replaces_the_last_in_one_step(parts: StoreParts, user: str) -> None:
    jobs = parts.jobs
    for name in ("first", "second"):
        await put_profile(parts, user)
        lease = await claimed(jobs, (await submitted(jobs, user, name)).id)
        assert await promoted(jobs, lease, name)
        job = await jobs.job(lease.job.id)
        assert (job.state, job.adapter, job.before, job.after) == (JobState.SUCCEEDED, made(name).id, 2.0, 1.5)
    assert await parts.adapters.adapter(UserAdapterId(user, made("second").id)) == made("second")
    assert await parts.adapters.adapter(UserAdapterId(user, made("first").id)) is None
    assert await parts.adapters.adapter_id(user) == made("second").id


async def test_promotion_refuses_other_record_lease_bank_or_user(parts: StoreParts, user: str) -> None:
    jobs = parts.jobs
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    assert not await promoted(jobs, lease, "a")  # there is no profile
    await put_profile(parts, user)
    before = await parts.adapters.kept(user)
    await put_profile(parts, user)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AdapterStore, "kept", AsyncMock(return_value=before))
        assert not await promoted(jobs, lease, "a")
    assert not await promoted(jobs, replace(lease, token="stolen"), "a")
    assert not await promoted(jobs, lease, "a", recipe="mta3:00000000:shared:c")
    assert await parts.adapters.adapter(UserAdapterId(user, made("a").id)) is None
    assert (await jobs.job(lease.job.id)).state is JobState.RUNNING
    assert await promoted(jobs, lease, "a")
    lease = await claimed(jobs, (await submitted(jobs, user, "b")).id)
    await parts.profiles.erase(user, known.LATER_MS, 0)  # and made again
    await put_profile(parts, user)
    assert not await promoted(jobs, lease, "b")
    assert await parts.adapters.adapter_id(user) is None
    assert await parts.adapters.adapted() == {}


async def test_a_submission_may_be_repeated_while_its_job_goes_well(jobs: JobStore, user: str) -> None:
    first = await submitted(jobs, user, append=True, traceparent="00-1-2-01")
    again = await submitted(jobs, user, append=True, traceparent="00-3-4-01")
    assert (again.id, again.traceparent) == (first.id, "00-1-2-01")
    assert await jobs.samples(user) == [b"a"]
    lease = await claimed(jobs, first.id)
    assert (await submitted(jobs, user, append=True)).id == first.id
    assert await jobs.end(lease, Trained(JobState.FAILED, error="for a reason"))
    second = await submitted(jobs, user, append=True)
    assert second.id.number == first.id.number + 1  # whoever asks again after a failure wants another try
    assert await jobs.samples(user) == [b"a"]  # equal samples are kept once
    assert (await submitted(jobs, user, "b", append=True)).traceparent == ""
    assert await jobs.samples(user) == [b"a", b"b"]
    assert (await submitted(jobs, user, append=True)).id.number == first.id.number + 3


@pytest.mark.parametrize("append", [False, True])
async def test_a_submission_whose_answer_was_lost_is_one_job(parts: StoreParts, user: str, *, append: bool) -> None:
    parts.connection.fail(Fault.LOST_ANSWER, after_writes=1)
    with pytest.raises(Unavailable):
        await submitted(parts.jobs, user, append=append)
    parts.connection.fail(Fault.TWICE, after_writes=1)
    job = await submitted(parts.jobs, user, append=append)
    assert await parts.jobs.jobs(user) == [job]
    parts.connection.fail(Fault.TWICE, after_writes=1)
    assert (await submitted(parts.jobs, user, "b", append=append)).id.number == job.id.number + 1
    assert await parts.jobs.samples(user) == [b"a", b"b"][not append :]


async def test_an_ending_whose_answer_was_lost_is_known_as_ones_own(parts: StoreParts, user: str) -> None:
    lease = await claimed(parts.jobs, (await submitted(parts.jobs, user)).id)
    parts.connection.fail(Fault.TWICE)
    assert await parts.jobs.end(lease, REJECTED)
    job = await submitted(parts.jobs, user)
    parts.connection.fail(Fault.TWICE)
    assert (await parts.jobs.cancel(job.id))[1]


@pytest.mark.parametrize("place", range(2))
async def test_a_call_says_that_it_made_a_job_though_it_was_sent_twice(
    parts: StoreParts, user: str, place: int
) -> None:
    parts.connection.fail(Fault.TWICE, place)
    assert (await submitted(parts.jobs, user)).is_new


async def test_of_equal_requests_at_once_one_makes_the_job(parts: StoreParts, user: str) -> None:
    made = await asyncio.gather(*(submitted(parts.jobs, user) for _ in range(8)))
    assert [sum(job.is_new for job in made), len({job.id for job in made})] == [1, 1]


async def test_the_same_samples_are_one_job_while_its_adapter_serves(parts: StoreParts, user: str, raw: Redis) -> None:
    await put_profile(parts, user)
    worker = WorkerSteps(parts)
    job = await submitted(parts.jobs, user)
    await worker.take()
    await worker.claim()
    assert await worker.promote()
    assert (await submitted(parts.jobs, user)).id == job.id
    await raw.delete(keys.adapter(user))
    again = await submitted(parts.jobs, user)
    assert (again.is_new, again.state) == (True, JobState.QUEUED)


async def test_a_job_whose_return_was_not_confirmed_is_taken_at_once(parts: StoreParts, user: str) -> None:
    job_id = (await submitted(parts.jobs, user)).id
    assert await parts.jobs.next_job(BANK, 1) == job_id
    lease = await claimed(parts.jobs, job_id)
    parts.connection.fail(Fault.TWICE)
    await parts.jobs.release(lease, counts=False)
    assert await parts.jobs.next_job(BANK, 1) == job_id


async def test_samples_of_an_erased_user_are_refused(parts: StoreParts, user: str) -> None:
    epoch = await parts.profiles.begin(user)
    await parts.profiles.erase(user, known.LATER_MS, 0)
    with pytest.raises(UserErased):
        await submitted(parts.jobs, user, epoch=epoch)
    assert await parts.jobs.samples(user) == []
    assert (await submitted(parts.jobs, user, epoch=await parts.profiles.begin(user))).state is JobState.QUEUED
    read = parts.jobs.job

    async def erased_before(job_id: JobId) -> Job | None:  # the new job is read back
        assert await parts.profiles.erase(user, known.LATER_MS, 0)
        return await read(job_id)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(UserErased):
        patched.setattr(parts.jobs, "job", erased_before)
        await submitted(parts.jobs, user, "b", epoch=await parts.profiles.begin(user))


async def test_a_job_id_nobody_remembers_is_not_used_again(parts: StoreParts, user: str, raw: Redis) -> None:
    given = set()
    for _ in range(3):
        jobs = [(await submitted(parts.jobs, user, text)).id for text in "ab"]
        assert jobs[1].number == jobs[0].number + 1
        assert [parse_job_id(str(job)) for job in jobs] == jobs
        assert given.isdisjoint(jobs)
        given.update(jobs)
        await parts.profiles.erase(user, known.LATER_MS, 0)
        await raw.delete(keys.epoch(user))  # its time is over


A, B = "aaaaaaaa", "bbbbbbbb"
ADA = KEYS.key("ada")


@pytest.fixture
async def adapted(parts: StoreParts) -> StoreParts:
    """A store in which Ada has an adapter of bank A."""
    await parts.put("ada", "text")
    await submitted(parts.jobs, ADA, bank=A)
    await trained(parts, A)
    return parts


def served(own: str, *, secret: str = known.SECRET, **named: str) -> ServedBanks:
    """Ada's tenant and one more, of which some name banks."""
    ring = KeyRing(1, [access_key(tenant, "app", tenant, Scope) for tenant in (known.TENANT, "acme")], named, "", {})
    return ServedBanks(ring, own, Tenants(secret, "default"), "default")


async def readapted(parts: StoreParts, bank: str, served: ServedBanks | None = None, *, room: int = 2) -> ReadaptTally:
    """What one run of `mta readapt` does while a bank is served, by default to everybody."""
    manifest: Any = SimpleNamespace(short=bank, embedder=SimpleNamespace(id=known.EMBEDDER), room=room, common=True)
    budget = JobBudget(max_tokens=1234, max_seconds=56)
    stores = parts.jobs, parts.adapters, parts.profiles
    return await Readapting(*stores, manifest=manifest, at_a_time=4, budget=budget, served=served).run()


async def trained(parts: StoreParts, bank: str, *, better: bool = True) -> Job:
    worker = WorkerSteps(parts, bank)
    await worker.take()
    await worker.claim()
    assert await (worker.promote() if better else worker.reject())
    return (await parts.jobs.jobs(ADA))[-1]


async def test_whoever_moves_back_and_forth_is_adapted_each_time(adapted: StoreParts) -> None:
    (before,) = await adapted.jobs.jobs(ADA)
    for move, bank in enumerate([B, A, B, A]):
        assert await readapted(adapted, bank) == ReadaptTally(queued=1)
        assert await readapted(adapted, bank) == ReadaptTally(queued=1)  # an interrupted run may be started again
        job = await trained(adapted, bank)
        assert (job.id.number - before.id.number, job.bank, job.state) == (move + 1, bank, JobState.SUCCEEDED)
        assert await adapted.adapters.adapted() == {bank: 1}
        assert await readapted(adapted, bank) == ReadaptTally()


async def test_readapt_retries_rejected_job_until_user_is_erased(adapted: StoreParts) -> None:
    (before,) = await adapted.jobs.jobs(ADA)
    with pytest.raises(BankError, match=f"bank {B} leaves users no rank.*--user-rank"):
        await readapted(adapted, B, room=0)
    assert await adapted.jobs.next_job(B, 0.05) is None
    for number in (before.id.number + 1, before.id.number + 2):
        assert await readapted(adapted, B) == ReadaptTally(queued=1)
        job = await trained(adapted, B, better=False)
        config = decode_config(job.config)
        assert (job.id.number, config.max_tokens, config.max_seconds) == (number, 1234, 56)
    assert await adapted.adapters.adapted() == {A: 1}
    await adapted.profiles.erase(ADA, known.LATER_MS, 0)
    assert await readapted(adapted, B) == ReadaptTally(settled=1)
    assert await readapted(adapted, B) == ReadaptTally()


async def test_who_was_adapted_by_feedback_alone_is_adapted_again(adapted: StoreParts, raw: Redis) -> None:
    await raw.delete(keys.samples(ADA))
    await adapted.feedback.add(ADA, "gen-1", Feedback("merged", "none"), Sample([], "said instead"), "")
    assert await readapted(adapted, B) == ReadaptTally(queued=1)
    assert (await trained(adapted, B)).state is JobState.SUCCEEDED


async def test_a_users_own_open_job_is_not_replaced(adapted: StoreParts) -> None:
    own = await submitted(adapted.jobs, ADA, "other samples", bank=B)
    assert await readapted(adapted, B) == ReadaptTally(queued=1)
    assert (await adapted.jobs.jobs(ADA))[-1] == own


async def test_a_user_gets_a_job_only_of_the_bank_that_serves_them(adapted: StoreParts) -> None:
    for by_other in (
        served(B, **{known.TENANT: A}),
        served(A, acme=B),
        served(B, acme=A, secret="not the gateways' own"),
    ):
        assert await readapted(adapted, B, by_other) == ReadaptTally(settled=1)
    assert await adapted.jobs.next_job(B, 0.05) is None
    assert await adapted.adapters.adapted() == {A: 1}
    for bank, by_bank in ((B, served(A, **{known.TENANT: B})), (A, served(A, acme=B))):
        assert await readapted(adapted, bank, by_bank) == ReadaptTally(queued=1)
        assert (await trained(adapted, bank)).state is JobState.SUCCEEDED
