"""How long every store holds texts that are not kept."""

from __future__ import annotations

import pytest
from redis.asyncio import Redis

from bench.rig.valkey import ValkeyProcess
from server.store.feedback import Feedback
from server.store.jobs import MAX_TRIES, Job, JobState, Lease, Trained
from server.store.profile_record import StoredItem
from server.store.profiles import PASSING_S, Change
from server.store.redis import keys
from server.store.samples import Sample
from tests.support.store_parts import (
    StoreParts,
    WorkerSteps,
    change,
    on_disk,
    profile,
    stored,
    submitted,
    until_forgotten,
)
from tests.support.valkeys.cluster import ValkeyCluster

ENDS = ["promoted", "rejected", "failed", "given up", "cancelled"]


async def asked(parts: StoreParts, user: str, *samples: str, forgets_s: int = PASSING_S, **fields: object) -> Job:
    return await submitted(parts.jobs, user, *samples, forgets_s=forgets_s, **fields)


async def claimed(parts: StoreParts) -> tuple[WorkerSteps, Lease]:
    worker = WorkerSteps(parts)
    await worker.take()
    await worker.claim()
    assert worker.lease is not None
    return worker, worker.lease


async def test_texts_expire_unless_they_are_kept(parts: StoreParts, raw: Redis, user: str) -> None:
    names = keys.items(user), keys.learned(user)
    assert await stored(parts.profiles, user, change("a"))
    await parts.feedback.add(user, "gen-1", Feedback("base", "none"), Sample([], "words"), "")
    for keeps_texts in (True, False, False, True):
        snapshot = await parts.profiles.read(user)
        assert snapshot.profile
        made = change("ab", keeps_texts=keeps_texts, updated_ms=snapshot.profile.updated_ms + 1)
        assert await parts.profiles.commit(user, snapshot.version, made, snapshot.epoch)
        lives = [await raw.ttl(name) for name in names]
        assert lives == [-1, -1] if keeps_texts else all(0 < life <= PASSING_S for life in lives)
        assert await raw.ttl(keys.vectors(user)) == await raw.ttl(keys.profile(user)) == -1


async def test_what_is_dropped_goes_before_what_is_put(parts: StoreParts, user: str) -> None:
    assert await stored(parts.profiles, user, change("ab"))
    snapshot = await parts.profiles.read(user)
    assert await parts.profiles.commit(user, snapshot.version, change("b", drop="ab"), snapshot.epoch)
    after = await parts.profiles.read(user)
    assert list(after.items) == list(after.vectors) == ["b"]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("forgets_s", [0, PASSING_S])
async def test_samples_go_with_the_end_of_their_job(parts: StoreParts, user: str, end: str, forgets_s: int) -> None:
    assert await stored(parts.profiles, user, change("a"))
    job = await asked(parts, user, "one", "two", forgets_s=forgets_s)
    if end == "cancelled":
        assert (await parts.jobs.cancel(job.id))[1]
    elif end == "given up":
        for _ in range(MAX_TRIES):
            _, lease = await claimed(parts)
            assert await parts.jobs.samples(user) == [b"one", b"two"]
            assert await parts.jobs.release(lease, counts=True)
        assert await parts.jobs.claim(job.id, 1) is None
    else:
        worker, lease = await claimed(parts)
        assert bool(lease.job.forgets) == bool(forgets_s)
        if end == "promoted":
            assert await worker.promote()
        else:
            assert await parts.jobs.end(lease, Trained(JobState(end)))
    after = await parts.jobs.job(job.id)
    assert after and after.state.ended
    assert await parts.jobs.samples(user) == ([] if forgets_s else [b"one", b"two"])


async def test_a_newer_job_takes_over_the_samples(parts: StoreParts, raw: Redis, user: str) -> None:
    assert await stored(parts.profiles, user, change("a"))
    await asked(parts, user, "one")
    await asked(parts, user, "two", append=True)
    assert await parts.jobs.samples(user) == [b"one", b"two"]
    assert 0 < await raw.ttl(keys.samples(user)) <= PASSING_S
    job = await asked(parts, user, "three", forgets_s=0)
    assert await raw.ttl(keys.samples(user)) == -1
    assert (await parts.jobs.cancel(job.id))[1]
    assert await parts.jobs.samples(user) == [b"three"]


@pytest.mark.usefixtures("quick_rewrites")
async def test_texts_leave_the_files_after_their_use(
    parts: StoreParts, nodes: list[ValkeyProcess], server: ValkeyProcess | ValkeyCluster, user: str
) -> None:
    words, said = "an item that nobody shall find again", "a sample that nobody shall find again"
    passing = Change(profile(keeps_texts=False), {"a": StoredItem(0, {"text": words})}, {}, ())
    assert await stored(parts.profiles, user, passing)
    await asked(parts, user, said)
    assert all(any(on_disk(text, node) for node in nodes) for text in (words, said))
    snapshot = await parts.profiles.read(user)
    dropped = change(drop="a", keeps_texts=False)
    assert await parts.profiles.commit(user, snapshot.version, dropped, snapshot.epoch)
    worker, _ = await claimed(parts)
    assert await worker.reject()
    await until_forgotten(parts.connection, words, *nodes)
    await until_forgotten(parts.connection, said, *nodes)
