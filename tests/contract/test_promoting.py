"""A trained adapter takes the place of the user's last one in one step, or not at all."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from adapters.recipe import UserAdapterId
from server.store.adapters import StoredAdapter
from server.store.jobs import JobState, Trained
from server.store.profiles import Change, Profile
from server.store.redis.jobs import RedisJobs
from tests.support.store_parts import BANK, KEYS, RECIPE, StoreParts, claimed, state, submitted


def made(name: str) -> StoredAdapter:
    raw = f"the bytes of {name}".encode()
    return StoredAdapter(f"{name:a<26}", RECIPE, hashlib.sha256(raw).hexdigest(), raw)


async def with_profile(parts: StoreParts, user: str) -> tuple[Profile, bytes]:
    """A user's record and its version."""
    profile = Profile("ada", 0, 1, "3887c9b9af8fe702", np.ones(8, "f4"))
    before = await parts.profiles.read(user)
    await parts.profiles.commit(user, before.version, Change(profile, {}, {}, ()), before.epoch)
    snapshot = await parts.profiles.read(user)
    assert snapshot.profile is not None
    return snapshot.profile, snapshot.version


async def test_a_promoted_adapter_takes_the_place_of_the_last_in_one_step(
    jobs: RedisJobs, parts: StoreParts, user: str
) -> None:
    for name in ("first", "second"):
        profile, version = await with_profile(parts, user)
        lease = await claimed(jobs, (await submitted(jobs, user, name)).id)
        assert await jobs.promote(lease, Trained(JobState.SUCCEEDED, 2.0, 1.5), profile, version, made(name))
        job = await jobs.job(lease.job.id)
        assert job is not None
        assert (job.state, job.adapter, job.before, job.after) == (JobState.SUCCEEDED, made(name).id, 2.0, 1.5)
    assert await parts.adapters.adapter(UserAdapterId(user, made("second").id)) == made("second")
    assert await parts.adapters.adapter(UserAdapterId(user, made("first").id)) is None
    assert await parts.adapters.adapter_id(user) == made("second").id


async def test_nothing_is_promoted_when_the_record_changed_or_the_lease_is_lost(
    jobs: RedisJobs, parts: StoreParts, user: str
) -> None:
    profile, version = await with_profile(parts, user)
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    trained = Trained(JobState.SUCCEEDED, 2.0, 1.5)
    assert not await jobs.promote(lease, trained, profile, b"another version", made("a"))
    assert not await jobs.promote(replace(lease, token="stolen"), trained, profile, version, made("a"))
    assert await parts.adapters.adapter(UserAdapterId(user, made("a").id)) is None
    assert await state(jobs, lease.job.id) is JobState.RUNNING
    assert await jobs.promote(lease, trained, profile, version, made("a"))


async def test_an_adapter_of_another_bank_than_the_jobs_is_not_promoted(
    jobs: RedisJobs, parts: StoreParts, user: str
) -> None:
    profile, version = await with_profile(parts, user)
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    other = replace(made("a"), recipe="mta3:00000000:shared:c")
    assert not await jobs.promote(lease, Trained(JobState.SUCCEEDED, 2.0, 1.5), profile, version, other)
    assert await state(jobs, lease.job.id) is JobState.RUNNING


async def test_nothing_is_promoted_for_a_user_who_was_erased_and_made_again(
    jobs: RedisJobs, parts: StoreParts, user: str
) -> None:
    await with_profile(parts, user)
    lease = await claimed(jobs, (await submitted(jobs, user)).id)
    await parts.profiles.erase(user, 1 << 52, 0)
    profile, version = await with_profile(parts, user)
    assert not await jobs.promote(lease, Trained(JobState.SUCCEEDED, 2.0, 1.5), profile, version, made("a"))
    assert await parts.adapters.adapter_id(user) is None
    assert set((await parts.adapters.adapted()).values()) <= {0}


async def test_users_are_listed_by_the_bank_of_their_adapter_until_they_are_forgotten(
    jobs: RedisJobs, parts: StoreParts
) -> None:
    users = [KEYS.key(f"listed-{n}") for n in range(5)]
    for user in users:
        profile, version = await with_profile(parts, user)
        lease = await claimed(jobs, (await submitted(jobs, user)).id)
        assert await jobs.promote(lease, Trained(JobState.SUCCEEDED, 2.0, 1.5), profile, version, made("a"))
    adapters = parts.adapters
    assert await adapters.adapted() == {BANK: 5}
    assert {user async for user in adapters.adapted_users(BANK)} == set(users)
    await adapters.forget_adapted(users[0], but=BANK)
    await adapters.forget_adapted(users[1])
    assert await adapters.adapted() == {BANK: 4}
