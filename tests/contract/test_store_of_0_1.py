"""What version 0.1 stored, byte for byte (`tests/fixtures/store-0.1.json`), is read and gone on with."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapters.recipe import UserAdapterId
from adapters.training.adapt_config import AdaptConfig
from bench.rig.valkey import ValkeyProcess
from server.store.jobs import JobId, JobState, Submission, Trained
from server.store.profiles import Change
from server.store.samples import Sample, decode_config, decode_sample
from server.store.tenants.user_key import UserKeys
from tests.support.store_parts import BANK, StoreParts

FIXTURE = Path(__file__).parents[1] / "fixtures" / "store-0.1.json"
KEYS = UserKeys("the secret of the fixtures", "default")
ADA, BOB, GONE = (KEYS.key(user) for user in ("ada", "bob", "gone"))
LATER_MS = 1 << 52


@pytest.fixture
async def parts(server: ValkeyProcess) -> AsyncIterator[StoreParts]:
    async with server.client() as raw:
        await raw.flushall()
        for name, kept in json.loads(FIXTURE.read_text("utf-8")).items():
            value = kept["value"]
            match kept["type"]:
                case "string":
                    await raw.set(name, bytes.fromhex(value))
                case "hash":
                    await raw.hset(name, mapping={field: bytes.fromhex(part) for field, part in value.items()})
                case "list":
                    await raw.rpush(name, *map(bytes.fromhex, value))
                case "set":
                    await raw.sadd(name, *map(bytes.fromhex, value))
                case "zset":
                    await raw.zadd(name, dict(value))
                case "stream":
                    for entry, fields in value:
                        await raw.xadd(name, fields, entry)
    async with StoreParts.opened(server.url) as parts:
        yield parts


async def test_profiles_are_read_and_changed(parts: StoreParts) -> None:
    for key, user in ((ADA, "ada"), (BOB, "bob")):
        snapshot = await parts.profiles.read(key)
        profile = snapshot.profile
        assert profile is not None
        assert (profile.user_id, profile.items, profile.embedder) == (user, 2, "3887c9b9af8fe702")
        assert profile.seen_by(profile.embedder) is profile
        assert profile.is_signed(BANK)
        assert [item.fields["text"] for item in snapshot.items.values()] == ["text of a", "text of b"]
        assert set(snapshot.vectors) == {"a", "b"}
        assert await parts.profiles.commit(key, snapshot.version, Change(profile, {}, {}, ("a",)), snapshot.epoch)
        assert set(await parts.profiles.items(key)) == {"b"}


async def test_a_users_adapter_is_served_as_before(parts: StoreParts) -> None:
    profile = await parts.profiles.load(ADA)
    assert profile is not None
    assert profile.adapter is not None
    stored = await parts.adapters.adapter(UserAdapterId(ADA, profile.adapter.id))
    assert stored is not None
    assert (stored.recipe, stored.raw) == (profile.adapter.recipe, b"the bytes of an adapter")
    assert await parts.adapters.adapted() == {BANK: 1}


async def test_jobs_are_read_and_what_was_queued_is_trained(parts: StoreParts) -> None:
    done, waiting = await parts.jobs.job(JobId(ADA, 1)), await parts.jobs.job(JobId(BOB, 1))
    assert done is not None
    assert waiting is not None
    assert (done.state, done.before, done.after) == (JobState.SUCCEEDED, 2.0, 1.5)
    assert (waiting.state, waiting.bank) == (JobState.QUEUED, "")
    assert decode_config(waiting.config) == AdaptConfig()
    samples = [decode_sample(raw) for raw in await parts.jobs.samples(BOB)]
    assert samples[0] == Sample([{"role": "user", "content": "question 0"}], "answer 0")
    await parts.jobs.overdue(BANK)
    await parts.signing.overdue()
    assert await parts.jobs.next_job(BANK, "w", 1) == waiting.id
    assert await parts.signing.take("w", 1) == BOB
    lease = await parts.jobs.claim(waiting.id, 30)
    assert lease is not None
    assert await parts.jobs.end(lease, Trained(JobState.REJECTED, 1.0, 1.0))


async def test_the_same_idempotency_key_still_gives_the_same_job(parts: StoreParts) -> None:
    submission = Submission([b"{}"], False, "{}", BANK, idempotency_key="key of bob")
    job = await parts.jobs.submit(BOB, submission, 100)
    assert job is not None
    assert job.id == JobId(BOB, 1)


async def test_users_are_erased(parts: StoreParts) -> None:
    erasure = await parts.profiles.erase(ADA, LATER_MS, 1)
    assert erasure is not None
    assert (erasure.erased.items, erasure.erased.samples, erasure.erased.jobs, erasure.erased.adapters) == (2, 3, 1, 1)
    assert await parts.profiles.epoch(GONE) == ""
