"""When workers look at whom: whatever dies, nobody who has work waits for ever, and nobody is looked at for nothing."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import redis.asyncio as redis

from bench.rig.processes import PATIENCE_S
from server.errors import Unavailable
from server.store import queue
from server.store.jobs import KEPT_JOBS, Backlog, Job, JobState, JobStore, Trained
from server.store.queue import POLL_S, UserQueue
from server.store.redis import keys
from tests.support.store_parts import BANK, KEYS, Fault, StoreParts, claimed, submitted
from tests.support.valkeys.clock import FAKE_TIME, ClockedValkey

OTHER_BANK = "00000000"
DUE, BACKGROUND, *_ = keys.queue("jobs", BANK)
REJECTED = Trained(JobState.REJECTED, 1.0, 1.0)


async def time_passes(raw: redis.Redis) -> None:
    """Whoever was to be looked at later is due."""
    for name in (DUE, BACKGROUND, keys.queue("sign", BANK)[0]):
        for user in await raw.zrange(name, 0, -1):
            await raw.zadd(name, {user: 1})
    await asyncio.sleep(0.002)  # whoever is looked at next has another score than before


async def in_queue(raw: redis.Redis, work: keys.Work = "jobs") -> list[str]:
    return [user.decode() for name in keys.queue(work, BANK)[:2] for user in await raw.zrange(name, 0, -1)]


async def test_a_job_is_taken_within_half_a_second_at_few_polls(
    parts: StoreParts, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, pauses, jobs = list[str](), list[tuple[float, int]](), list[Job]()
    parts.connection._timed = lambda kind, *_: asked.append(kind)

    async def pause(seconds: float) -> None:
        pauses.append((seconds, len(asked)))
        if len(pauses) == 3:
            jobs.append(await submitted(parts.jobs, user))

    monkeypatch.setattr(queue, "asyncio", SimpleNamespace(sleep=pause))
    assert await parts.jobs.next_job(BANK, PATIENCE_S) == jobs[0].id
    assert pauses == [(POLL_S, questions) for questions in (1, 2, 3)]
    assert POLL_S < 0.5


async def test_a_job_taken_and_not_claimed_is_taken_again_first(jobs: JobStore, user: str, raw: redis.Redis) -> None:
    job = await submitted(jobs, user)
    assert await jobs.next_job(BANK, 1) == job.id
    assert await jobs.next_job(BANK, 0.05) is None
    others = []
    for n in range(3):
        others.append((await submitted(jobs, KEYS.key(f"waiting-{n}"))).id)
    await raw.zadd(DUE, {user: (await raw.zscore(DUE, user)) - 10_000})
    assert [await jobs.next_job(BANK, 1) for _ in range(4)] == [job.id, *others]
    assert await jobs.next_job(BANK, 0.05) is None


async def test_a_job_that_no_gateway_called_for_is_found(parts: StoreParts, user: str, raw: redis.Redis) -> None:
    parts.connection.fail(Fault.LOST_REQUEST, after_writes=2)  # it is listed, and made
    with pytest.raises(Unavailable):
        await submitted(parts.jobs, user)
    (job,) = await parts.jobs.jobs(user)
    assert await parts.jobs.next_job(BANK, 0.05) is None
    await time_passes(raw)
    assert await parts.jobs.next_job(BANK, 1) == job.id
    assert await in_queue(raw) == [user]


async def test_a_job_made_long_after_it_was_listed_is_refused(jobs: JobStore, user: str, raw: redis.Redis) -> None:
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Unavailable, match="too long"):
        patched.setattr("server.store.queue.RESERVED_MS", -1000)
        await submitted(jobs, user)
    assert await jobs.jobs(user) == await jobs.samples(user) == await in_queue(raw) == []


async def test_a_job_is_looked_at_when_its_lease_has_run_out(jobs: JobStore, user: str, raw: redis.Redis) -> None:
    job = await submitted(jobs, user)
    assert await jobs.next_job(BANK, 1) == job.id
    lease = await claimed(jobs, job.id, 30)
    for _ in range(2):
        now_ms = 1000 * (await raw.time())[0]
        assert 29_000 < await raw.zscore(DUE, user) - now_ms < 31_000 + 1000 * PATIENCE_S
        await time_passes(raw)
        assert await jobs.next_job(BANK, 0.05) is None
    assert (await submitted(jobs, user)).id == job.id  # a repeated request does not call for it
    assert await jobs.backlog(BANK) == Backlog(1, 0, 0)
    assert await jobs.renew(lease, 0.001, step=1, of=2)
    await time_passes(raw)
    assert await jobs.next_job(BANK, 1) == job.id
    assert await jobs.next_job(BANK, 0.05) is None
    lease = await claimed(jobs, job.id, 0.001)
    await time_passes(raw)  # somebody else has looked at it meanwhile
    for _ in range(2):
        assert await jobs.renew(lease, 30, step=1, of=2)
    assert await jobs.backlog(BANK) == Backlog(1, 0, 0)
    assert await jobs.end(lease, REJECTED)
    assert await in_queue(raw) == []


async def test_the_backlog_is_what_is_due_and_what_workers_have(jobs: JobStore, user: str, raw: redis.Redis) -> None:
    assert await jobs.backlog(BANK) == Backlog(0, 0, 0)
    job = await submitted(jobs, user)
    await submitted(jobs, f"{user}x", background=True)
    seconds, _ = await raw.time()
    await raw.zadd(DUE, {user: 1000 * seconds - 90_000})
    backlog = await jobs.backlog(BANK)
    assert backlog == Backlog(2, 2, pytest.approx(90, abs=PATIENCE_S))
    assert backlog.oldest_s >= 89
    assert await jobs.next_job(BANK, 1) == job.id
    lease = await claimed(jobs, job.id)
    assert await jobs.backlog(BANK) == Backlog(2, 1, pytest.approx(0, abs=PATIENCE_S))
    assert await jobs.end(lease, REJECTED)
    assert (await jobs.backlog(BANK)).open == 1
    await jobs.cancel((await submitted(jobs, user, "another")).id)
    assert await jobs.next_job(BANK, 1)  # of the other
    assert (await jobs.backlog(BANK)).open == 1


async def test_background_work_is_taken_when_nothing_else_is_due(jobs: JobStore, user: str, raw: redis.Redis) -> None:
    own = (await submitted(jobs, user, background=True)).id
    asked = (await submitted(jobs, f"{user}x")).id
    assert [await jobs.next_job(BANK, 1) for _ in range(2)] == [asked, own]
    lease = await claimed(jobs, own)
    assert await jobs.release(lease, counts=False)
    assert await in_queue(raw) == [f"{user}x", user]
    await submitted(jobs, user, "now they ask")
    assert await raw.zcard(BACKGROUND) == 0
    behind = (await submitted(jobs, f"{user}y")).id
    again = (await submitted(jobs, user, "again")).id  # who asks again keeps their place
    assert [await jobs.next_job(BANK, 1) for _ in range(2)] == [again, behind]


@pytest.mark.parametrize("background", [False, True])
async def test_tenants_take_turns(parts: StoreParts, raw: redis.Redis, background: bool) -> None:
    queue = parts.to_sign

    async def came(tenant: str, *users: str) -> None:
        for user in users:
            await queue.add(user, tenant=tenant, background=background)

    async def taken(count: int) -> list[str | None]:
        return [await queue.take(1) for _ in range(count)]

    await came("a", "a1", "a2", "a3", "a4", "a5")
    await came("b", "b1", "b2")
    assert await taken(3) == ["a1", "b1", "a2"]
    await came("c", "c1", "c2")  # has no turns to catch up on
    await came("a", "a5", "a6")  # who waits keeps the place
    assert await taken(7) == ["b2", "c1", "a3", "c2", "a4", "a5", "a6"]
    assert await queue.take(0.05) is None
    for user in await in_queue(raw, "sign"):
        await queue.remove(user)
    assert not await raw.exists(*keys.queue("sign", BANK))


async def test_a_call_before_a_worker_has_left_is_heard(parts: StoreParts, user: str, raw: redis.Redis) -> None:
    queue, gateway = (UserQueue(parts.connection, "jobs", BANK) for _ in range(2))
    for late in (False, True):
        await gateway.add(user)
        assert await queue.take(1) == user
        if late:  # whoever took the user has been silent, so they are due
            await time_passes(raw)
            await queue.remember_score(user)
        await gateway.add(user)
        await queue.postpone(user, 60_000)
        assert await gateway.take(1) == user
        await gateway.remove(user)
        assert await in_queue(raw) == []


async def test_a_reservation_outlives_an_earlier_job(parts: StoreParts, user: str, raw: redis.Redis) -> None:
    job = await submitted(parts.jobs, user)
    await parts.jobs.remove_erased(user, BANK)
    assert await parts.jobs.next_job(BANK, 1) == job.id  # who is back already stays in the queue
    lease = await claimed(parts.jobs, job.id)
    reservation = await UserQueue(parts.connection, "jobs", BANK).reserve(user)  # by another gateway, which is slow
    assert await parts.jobs.end(lease, REJECTED)
    await parts.jobs.remove_erased(user, BANK)
    assert await in_queue(raw) == [reservation.entry]
    await time_passes(raw)  # it never made one
    assert await parts.jobs.next_job(BANK, 0.05) is None
    assert await in_queue(raw) == []


@pytest.mark.skipif(FAKE_TIME is None, reason="faketime is not installed: apt-get install faketime")
async def test_job_of_a_dead_worker_is_found_after_clock_set_back(tmp_path: Path, user: str) -> None:
    with ClockedValkey(tmp_path) as server:
        async with StoreParts.opened(server.url) as parts:
            server.set_clock(3600)
            job = await submitted(parts.jobs, user)
            for ahead_s in (3600, 0):
                server.set_clock(ahead_s)
                assert await parts.jobs.next_job(BANK, 1) == job.id
                assert await parts.jobs.claim(job.id, 15) is not None


async def test_a_job_is_for_the_workers_of_its_bank_alone(jobs: JobStore, user: str, raw: redis.Redis) -> None:
    await submitted(jobs, user)
    assert await jobs.next_job(OTHER_BANK, 0.05) is None
    newer = await submitted(jobs, user, bank=OTHER_BANK)
    assert await jobs.next_job(BANK, 0.05) is None
    assert await in_queue(raw) == []
    assert await jobs.next_job(OTHER_BANK, 1) == newer.id


async def test_a_job_that_cannot_be_read_keeps_nobody_waiting(jobs: JobStore, user: str, raw: redis.Redis) -> None:
    job, other = await submitted(jobs, user), KEYS.key("behind it")
    await raw.hset(keys.job(*job.id), "state", "paused")
    behind = await submitted(jobs, other)
    assert await jobs.next_job(BANK, 1) == behind.id
    assert await in_queue(raw) == [user, other]
    with pytest.raises(Unavailable) as caught:
        await jobs.job(job.id)
    assert caught.value.code == "store_corrupt"


async def test_attempts_at_a_signature_are_counted_by_bank(parts: StoreParts, user: str, raw: redis.Redis) -> None:
    signing, other = parts.to_sign, UserQueue(parts.connection, "sign", OTHER_BANK)
    for _ in range(3):
        await signing.add(user)
    assert await other.take(0.05) is None
    for beginning in (1, 2, 3):  # each of them ends its worker
        assert await signing.take(1) == user
        assert await signing.count_attempt(user) == beginning
        assert await signing.take(0.05) is None
        await time_passes(raw)
    assert await signing.take(1) == user
    await signing.remove(user)
    await time_passes(raw)
    assert await signing.take(0.05) is None
    await signing.add(user)
    for _ in range(2):
        assert await signing.take(1) == user
        await time_passes(raw)
        assert await UserQueue(parts.connection, "sign", BANK).take(1) == user  # while the worker waits for the model
        assert await signing.count_attempt(user) == 1
        await signing.remove(user)
        await time_passes(raw)
    assert await signing.take(1) == user
    await signing.remove_erased(user)
    assert await signing.count_attempt(user) == 0
    assert not await raw.exists(*keys.queue("sign", BANK))


async def test_an_erased_user_leaves_the_queues_of_every_bank(parts: StoreParts, raw: redis.Redis) -> None:
    user = KEYS.key("moved")
    await submitted(parts.jobs, user, bank=OTHER_BANK)
    for signing in (UserQueue(parts.connection, "sign", OTHER_BANK), parts.to_sign):
        await signing.add(user)
        assert await signing.count_attempt(user) == 1
    for number in range(KEPT_JOBS):  # until nothing of the user's own says which bank that was
        await submitted(parts.jobs, user, f"sample {number}", background=number == 0)
    assert await parts.erase("moved")
    assert [name async for name in raw.scan_iter() if user.encode() in name] == [keys.epoch(user).encode()]
    for work, bank in itertools.product(("jobs", "sign"), (BANK, OTHER_BANK)):
        assert (work, bank, await raw.exists(*keys.queue(work, bank))) == (work, bank, 0)
