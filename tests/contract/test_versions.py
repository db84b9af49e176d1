"""A user's adapters: which of them are kept, which one serves, and what else happens to the user meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from adapters.recipe import UserAdapterId
from server.errors import Unavailable, UserErased
from server.store.adapters import KeptVersions
from server.store.jobs import JobState
from server.store.redis import keys
from server.store.rotation import Rotation
from server.store.tenants.user_key import User
from tests.support import store_parts as known
from tests.support.store_parts import BANK, KEYS, TENANT, Fault, StoreParts, WorkerSteps, submitted

OTHER_BANK = "00000000"
_numbers = itertools.count()
ADA = KEYS.key("ada")


async def promoted(parts: StoreParts, at_most: int = 3, bank: str = BANK) -> str:
    """Ada's newest version, by the id of its adapter."""
    await submitted(parts.jobs, ADA, f"sample {next(_numbers)}", bank=bank)
    worker = WorkerSteps(parts, bank, at_most)
    await worker.take()
    await worker.claim()
    adapter = await worker.promote()
    assert adapter is not None
    return adapter


async def serve(parts: StoreParts, number: int) -> bool:
    found = await parts.adapters.kept(ADA)
    return await parts.adapters.serve(ADA, found, version(found, number))


def version(found: KeptVersions, number: int) -> known.AdapterVersion:
    return next(one for one in found.versions if one.number == number)


async def numbers(parts: StoreParts) -> list[int]:
    """Ada's versions, newest first, the one that serves negative; all of them whole."""
    found = await parts.adapters.kept(ADA)
    for one in found.versions:
        stored = await parts.adapters.adapter(UserAdapterId(ADA, one.note.id))
        assert (stored is not None) == (one is found.serving)
        assert stored is None or (stored.recipe, stored.sha256) == (one.note.recipe, one.sha256)
        assert stored is None or hashlib.sha256(stored.raw).hexdigest() == one.sha256
    assert (found.profile.adapter if found.profile else None) == (found.serving and found.serving.note)
    return [-one.number if one is found.serving else one.number for one in found.versions]


@pytest.fixture
async def adapted(parts: StoreParts) -> StoreParts:
    """A store in which Ada has three versions."""
    await parts.put("ada", "text")
    for _ in range(3):
        await promoted(parts)
    return parts


async def test_versions_are_numbered_and_say_what_they_are_made_from(parts: StoreParts) -> None:
    assert await parts.adapters.kept(ADA) == KeptVersions(b"", None, [])
    await parts.put("ada", "text")
    assert await numbers(parts) == []
    made = [await promoted(parts) for _ in range(2)]
    found = await parts.adapters.kept(ADA)
    assert [one.note.id for one in found.versions] == made[::-1]
    assert [(one.rank, one.samples, one.before, one.after) for one in found.versions] == [(2, 10, 2.0, 1.0)] * 2
    assert await numbers(parts) == [-2, 1]


async def test_the_oldest_makes_room_and_the_one_that_serves_last(parts: StoreParts, raw: Redis) -> None:
    await parts.put("ada", "text")
    for _ in range(5):
        await promoted(parts, at_most=5)
    assert await serve(parts, 1)
    for at_most, left in ((3, [-6, 5, 1]), (2, [-7, 6]), (1, [-8])):
        await promoted(parts, at_most)
        assert await numbers(parts) == left
        assert len(await raw.hkeys(keys.adapter(ADA))) == 3 + 2 * len(left)


async def test_a_version_serves_again_and_engines_get_no_other(adapted: StoreParts) -> None:
    assert await numbers(adapted) == [-3, 2, 1]
    for number, serving in ((1, [3, 2, -1]), (3, [-3, 2, 1]), (2, [3, -2, 1])):
        chosen = version(await adapted.adapters.kept(ADA), number)
        assert await serve(adapted, number)
        assert await numbers(adapted) == serving
        assert await adapted.adapters.adapter_id(ADA) == chosen.note.id


async def test_a_choice_whose_answer_is_lost_is_made_once_or_never(adapted: StoreParts) -> None:
    for fault, number, serving in ((Fault.LOST_REQUEST, 1, [-3, 2, 1]), (Fault.LOST_ANSWER, 1, [3, 2, -1])):
        adapted.connection.fail(fault, after_writes=2)
        with pytest.raises(Unavailable):
            await serve(adapted, number)
        assert await numbers(adapted) == serving
    adapted.connection.fail(Fault.TWICE, after_writes=2)
    assert await serve(adapted, 2)
    assert await numbers(adapted) == [3, -2, 1]


async def test_an_adapter_from_before_versions_is_the_first(parts: StoreParts, raw: Redis) -> None:
    await parts.put("ada", "text")
    before = await promoted(parts)
    await raw.hdel(keys.adapter(ADA), "facts:1")
    (first,) = (await parts.adapters.kept(ADA)).versions
    assert (first.note.id, first.number, first.samples, first.after) == (before, 1, None, None)
    await promoted(parts)
    assert await numbers(parts) == [-2, 1]
    assert await serve(parts, 1)
    assert await numbers(parts) == [2, -1]
    assert version(await parts.adapters.kept(ADA), 1) == first


async def test_a_worker_without_versions_replaces_what_serves(adapted: StoreParts, raw: Redis) -> None:
    await serve(adapted, 2)
    found = await adapted.adapters.kept(ADA)
    note, text = replace(found.serving.note, id="q" * 26), b"of a worker of the version before"
    change = known.put_of("ada", "text", await adapted.profiles.read(ADA))
    noted = replace(change, profile=replace(change.profile, adapter=note))
    assert await adapted.profiles.commit(ADA, found.record, noted, await adapted.profiles.begin(ADA))
    sha256 = hashlib.sha256(text).hexdigest()
    await raw.hset(keys.adapter(ADA), mapping={"id": note.id, "sha256": sha256, "raw": text})
    assert await numbers(adapted) == [-4, 3, 1]
    await promoted(adapted)
    assert await numbers(adapted) == [-5, 4, 3]


async def test_a_choice_a_promotion_and_an_erasure_come_in_some_order(adapted: StoreParts) -> None:
    for erases in (False, False, True):
        await submitted(adapted.jobs, ADA, f"sample {next(_numbers)}")
        worker = WorkerSteps(adapted)
        await worker.take()
        await worker.claim()
        acts = [serve(adapted, (await adapted.adapters.kept(ADA)).versions[-1].number), worker.promote()]
        served, made, *_ = await asyncio.gather(*acts, *([adapted.erase("ada")] if erases else []))
        found = await numbers(adapted)
        job = await adapted.jobs.job(worker.lease.job.id)
        if erases:
            assert (found, job, await adapted.adapters.adapted()) == ([], None, {})
        else:
            assert (sum(number < 0 for number in found), len(found)) == (1, 3)
            assert (job.state is JobState.SUCCEEDED) == bool(made) == (job.adapter != "")
            assert served or made


async def test_a_choice_from_what_has_changed_writes_nothing(adapted: StoreParts) -> None:
    before = await adapted.adapters.kept(ADA)
    await promoted(adapted)
    assert not await adapted.adapters.serve(ADA, before, version(before, 2))
    assert await numbers(adapted) == [-4, 3, 2]
    await adapted.erase("ada")
    await adapted.put("ada", "a new life")
    assert not await adapted.adapters.serve(ADA, before, version(before, 2))
    assert (await numbers(adapted), await adapted.adapters.adapted()) == ([], {})


async def test_a_choice_ends_the_job_that_nobody_asked_for(adapted: StoreParts) -> None:
    for background, state in ((True, JobState.SUPERSEDED), (False, JobState.QUEUED)):
        job = await submitted(adapted.jobs, ADA, "another", background=background)
        assert await serve(adapted, 1 + background)
        assert (await adapted.jobs.job(job.id)).state is state


async def test_when_a_version_was_chosen_is_known(adapted: StoreParts) -> None:
    since_ms = (await submitted(adapted.jobs, ADA, "another")).created_ms
    await serve(adapted, 1)
    assert since_ms <= (await adapted.adapters.kept(ADA)).chosen_ms < since_ms + 60_000
    await promoted(adapted)
    await serve(adapted, 4)  # which serves anyway
    assert (await adapted.adapters.kept(ADA)).chosen_ms == 0


async def test_a_user_is_of_the_bank_of_the_version_that_serves(adapted: StoreParts) -> None:
    await promoted(adapted, bank=OTHER_BANK)
    assert await adapted.adapters.adapted() == {OTHER_BANK: 1}
    assert await serve(adapted, 3)
    assert await adapted.adapters.adapted() == {BANK: 1}


async def test_all_versions_count_as_bytes_and_are_erased(adapted: StoreParts) -> None:
    held = (await adapted.profiles.measure(ADA))[1]
    await promoted(adapted, at_most=1)
    fewer = (await adapted.profiles.measure(ADA))[1]
    assert (held["adapters"], fewer["adapters"], held["bytes"] > fewer["bytes"]) == (1, 1, True)
    for _ in range(2):
        await promoted(adapted)
    erasure = await adapted.erase("ada")
    assert (erasure.erased.adapters, await numbers(adapted)) == (3, [])
    assert await adapted.adapters.adapted() == {}


async def test_versions_move_with_a_user_to_another_key(
    begun: Rotation, parts: StoreParts, someone: User, old: str
) -> None:
    await submitted(parts.jobs, old, "another")
    worker = WorkerSteps(parts)
    await worker.take()
    await worker.claim()
    assert await worker.promote()
    found = await parts.adapters.kept(old)
    assert await begun.move(old, someone.keys[0], TENANT)
    with pytest.raises(UserErased):
        await parts.adapters.serve(old, found, version(found, 1))
    moved = await parts.adapters.kept(someone.keys[0])
    assert (moved.versions, moved.serving) == (found.versions, found.serving)
    assert await parts.adapters.serve(someone.keys[0], moved, version(moved, 1))
