"""How workers are woken: whatever dies, whoever was called is called again in time, however busy all are."""

from __future__ import annotations

from pathlib import Path

import pytest
import redis.asyncio as redis

from bench.rig.processes import PATIENCE_S
from bench.rig.valkey import FAKE_TIME, ValkeyProcess
from server.errors import Unavailable
from server.store.jobs import KEPT_JOBS, JobState, Trained
from server.store.redis.jobs import RedisJobs
from server.store.redis.queue import RedisQueue
from server.store.redis.signing import RedisSigning
from tests.support.faults import Fault, FaultyConnection
from tests.support.store_parts import BANK, KEYS, StoreParts, submitted

OTHER_BANK = "00000000"
CALLS, OPEN = f"mta:{{jobs:{BANK}}}:calls", f"mta:{{jobs:{BANK}}}:open"
LATER_MS = 1 << 52


async def test_what_a_worker_read_and_did_not_live_to_claim_is_called_again_though_others_are_waiting(
    jobs: RedisJobs, user: str, no_grace: None
) -> None:
    job = await submitted(jobs, user)
    assert await jobs.next_job(BANK, "dies", 1) == job.id
    waiting = [KEYS.key(f"waiting-{n}") for n in range(3)]
    others = {(await submitted(jobs, other)).id for other in waiting}
    assert await jobs.overdue(BANK) == [job.id]
    heard = {await jobs.next_job(BANK, "lives", 1) for _ in range(4)}
    assert heard == {job.id, *others}
    assert await jobs.next_job(BANK, "lives", 0.05) is None


async def test_a_job_whose_gateway_died_before_it_could_announce_it_is_found(
    server: ValkeyProcess, jobs: RedisJobs, user: str, raw: redis.Redis
) -> None:
    connection = FaultyConnection(server.url)
    await connection.check()
    connection.fail(Fault.LOST_REQUEST, after_writes=2)  # it is on the list, and made
    with pytest.raises(Unavailable):
        await submitted(RedisJobs(connection), user)
    await connection.close()
    (job,) = await jobs.jobs(user)
    assert await raw.xlen(CALLS) == 0
    await raw.zadd(OPEN, {user: 0})  # the time has come
    assert await jobs.overdue(BANK) == [job.id]
    assert await jobs.next_job(BANK, "w", 1) == job.id


async def test_a_job_that_is_made_long_after_it_was_listed_is_refused(
    jobs: RedisJobs, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.store.redis.jobs.LISTED_MS", -1000)
    with pytest.raises(Unavailable, match="too long"):
        await submitted(jobs, user)
    assert await jobs.jobs(user) == []
    assert await jobs.samples(user) == []


async def test_jobs_whose_workers_died_are_announced_once_while_all_are_busy(
    jobs: RedisJobs, user: str, no_grace: None, raw: redis.Redis
) -> None:
    job = await submitted(jobs, user)
    await jobs.next_job(BANK, "dies", 1)
    assert await jobs.claim(job.id, 0.001) is not None
    assert await jobs.overdue(BANK) == [job.id]
    for _ in range(5):
        assert await jobs.overdue(BANK) == []
    assert await raw.xlen(CALLS) == 1


async def test_a_job_is_as_old_as_its_call_until_a_worker_takes_it(
    jobs: RedisJobs, user: str, raw: redis.Redis
) -> None:
    assert await jobs.oldest_waiting_s(BANK) == 0
    seconds, _ = await raw.time()
    await raw.xadd(CALLS, {"id": user}, id=f"{1000 * seconds - 90_000}-0")
    await submitted(jobs, f"{user}x")
    assert 89 <= await jobs.oldest_waiting_s(BANK) < 90 + PATIENCE_S
    await raw.delete(CALLS)


async def test_what_has_ended_is_no_longer_looked_after(jobs: RedisJobs, user: str, raw: redis.Redis) -> None:
    await submitted(jobs, user)
    job_id = await jobs.next_job(BANK, "w", 1)
    assert job_id is not None
    assert (await jobs.open_jobs(BANK), await jobs.waiting_jobs(BANK)) == (1, 1)
    lease = await jobs.claim(job_id, 30)
    assert lease is not None
    assert (await jobs.open_jobs(BANK), await jobs.waiting_jobs(BANK)) == (1, 0)
    assert await jobs.end(lease, Trained(JobState.REJECTED, 1.0, 1.0))
    assert (await jobs.open_jobs(BANK), await jobs.waiting_jobs(BANK)) == (0, 0)
    assert await raw.xlen(CALLS) == 0


async def test_whom_a_request_has_listed_stays_looked_after_until_it_has_made_its_job(
    parts: StoreParts, user: str, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await submitted(parts.jobs, user)
    lease = await parts.jobs.claim(job.id, 30)
    assert lease is not None
    await RedisQueue(parts.connection, "jobs", BANK).enlist(user)  # by another gateway, which is slow
    assert await parts.jobs.end(lease, Trained(JobState.REJECTED, 1.0, 1.0))
    await parts.jobs.withdraw(user, BANK)
    assert await parts.jobs.open_jobs(BANK) == 1
    monkeypatch.setattr("server.store.redis.queue.LISTED_MS", 0)  # it never made one
    await raw.zadd(OPEN, {user: 0})
    assert await parts.jobs.overdue(BANK) == []
    assert await parts.jobs.open_jobs(BANK) == 0


@pytest.mark.skipif(FAKE_TIME is None, reason="faketime is not installed: apt-get install faketime")
async def test_a_job_whose_worker_died_is_found_though_the_clock_was_set_back(tmp_path: Path, user: str) -> None:
    server = ValkeyProcess(tmp_path, clock=True).start()
    try:
        async with StoreParts.opened(server.url) as parts:
            server.set_clock(3600)
            job = await submitted(parts.jobs, user)
            assert await parts.jobs.next_job(BANK, "dies", 1) == job.id
            assert await parts.jobs.claim(job.id, 15) is not None
            server.set_clock(0)
            assert await parts.jobs.overdue(BANK) == [job.id]
            assert await parts.jobs.next_job(BANK, "lives", 1) == job.id
            assert await parts.jobs.claim(job.id, 15) is not None
    finally:
        server.kill()


async def test_a_worker_hears_of_the_jobs_of_its_own_bank_alone(jobs: RedisJobs, user: str) -> None:
    job = await submitted(jobs, user)
    assert job.bank == BANK
    assert await jobs.next_job(OTHER_BANK, "w", 0.05) is None
    assert await jobs.overdue(OTHER_BANK) == []
    assert await jobs.next_job(BANK, "w", 1) == job.id


async def test_whose_newest_job_is_for_another_bank_is_not_called_for_the_last_one(
    jobs: RedisJobs, user: str, raw: redis.Redis, no_grace: None
) -> None:
    await submitted(jobs, user)
    newer = await submitted(jobs, user, bank=OTHER_BANK)
    assert await jobs.overdue(BANK) == []
    assert await jobs.next_job(BANK, "w", 0.05) is None
    assert await raw.zcard(OPEN) == await raw.xlen(CALLS) == 0
    assert await jobs.next_job(OTHER_BANK, "w", 1) == newer.id


async def test_a_job_of_a_later_version_that_cannot_be_read_keeps_nobody_else_waiting(
    jobs: RedisJobs, user: str, raw: redis.Redis, no_grace: None
) -> None:
    job, other = await submitted(jobs, user), KEYS.key("behind it")
    await raw.hset(f"mta:{{{user}}}:job:{job.id.number}", "state", "paused")
    behind = await submitted(jobs, other)
    await raw.delete(CALLS)
    assert await jobs.overdue(BANK) == [behind.id]
    with pytest.raises(Unavailable) as caught:
        await jobs.job(job.id)
    assert caught.value.code == "store_corrupt"


async def test_signatures_are_asked_for_by_bank_once_at_a_time_and_counted_while_they_end_nobody(
    parts: StoreParts, user: str, no_grace: None
) -> None:
    signing, other = parts.signing, RedisSigning(parts.connection, OTHER_BANK)
    for _ in range(3):
        await signing.ask(user)
    assert await other.take("w", 0.05) is None
    for beginning in (1, 2, 3):  # each of them ends its worker
        assert await signing.take(f"w{beginning}", 1) == user
        assert await signing.begin(user) == beginning
        assert await signing.take("another", 0.05) is None
        assert await signing.overdue() == [user]
    assert await signing.take("w", 1) == user
    await signing.done(user)
    assert await signing.overdue() == []
    await signing.ask(user)
    assert await signing.take("w", 1) == user
    assert await signing.begin(user) == 1


async def test_a_worker_that_is_slow_is_none_that_died(parts: StoreParts, user: str, raw: redis.Redis) -> None:
    await parts.signing.ask(user)
    for _ in range(3):
        await raw.zadd(f"mta:{{sign:{BANK}}}:open", {user: 0})  # the time has come
        assert await parts.signing.take("w", 1) == user
        assert await parts.signing.overdue() == [user]  # while the worker waits for the model
        assert await parts.signing.begin(user) == 1
        await parts.signing.done(user)


async def test_nothing_is_counted_of_a_user_who_is_erased_before_their_worker_begins(
    parts: StoreParts, user: str, raw: redis.Redis
) -> None:
    await parts.signing.ask(user)
    assert await parts.signing.take("w", 1) == user
    await parts.signing.withdraw(user)
    assert await parts.signing.begin(user) == 0
    assert not await raw.exists(f"mta:{{sign:{BANK}}}:begun")


async def test_workers_that_are_gone_are_forgotten(
    parts: StoreParts, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.store.redis.queue.GONE_MS", -1)
    queue = RedisQueue(parts.connection, "jobs", BANK)
    for name in ("one", "two"):
        await queue.next(name, 0.01)
    await queue.call("somebody")
    await queue.next("three", 1)  # and does not acknowledge
    await queue.tidy()
    assert [consumer["name"] for consumer in await raw.xinfo_consumers(CALLS, "workers")] == [b"three"]


async def test_an_erased_user_leaves_the_queues(parts: StoreParts, user: str, raw: redis.Redis) -> None:
    job = await submitted(parts.jobs, user)
    await parts.signing.ask(user)
    await parts.profiles.erase(user, LATER_MS, 0)
    await parts.jobs.withdraw(user, job.bank)
    await parts.signing.withdraw(user)
    assert [name async for name in raw.scan_iter() if user.encode() in name] == [f"mta:{{{user}}}:epoch".encode()]
    assert await raw.xlen(CALLS) == await raw.zcard(OPEN) == 0


async def test_an_erased_user_leaves_the_queues_of_every_bank_that_there_has_been(
    parts: StoreParts, raw: redis.Redis
) -> None:
    user = KEYS.key("moved")
    await submitted(parts.jobs, user, bank=OTHER_BANK)
    await RedisSigning(parts.connection, OTHER_BANK).ask(user)
    for number in range(KEPT_JOBS):  # until nothing of the user's own says which bank that was
        await submitted(parts.jobs, user, f"sample {number}")
    assert await parts.erase("moved")
    assert [name async for name in raw.scan_iter() if user.encode() in name] == [f"mta:{{{user}}}:epoch".encode()]
    for work in ("jobs", "sign"):
        for bank in (BANK, OTHER_BANK):
            kept = [await raw.exists(f"mta:{{{work}:{bank}}}:{what}") for what in ("open", "called", "listed")]
            assert (work, bank, kept, await raw.xlen(f"mta:{{{work}:{bank}}}:calls")) == (work, bank, [0, 0, 0], 0)
