"""From bank to bank and back: whoever's adapter is stale gets a job, until one of them is promoted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from bank.errors import BankError
from server.store.jobs import Job, JobState
from server.store.samples import JobBudget, decode_config
from server.store.tenants.access_keys import KeyRing, Scope, access_key
from server.store.tenants.user_key import Tenants
from server.worker.readapting import Readapting, ReadaptTally, ServedBanks
from tests.support.store_parts import EMBEDDER, KEYS, SECRET, TENANT, StoreParts, WorkerSteps, submitted

A, B = "aaaaaaaa", "bbbbbbbb"
ADA = KEYS.key("ada")


@pytest.fixture
async def parts(parts: StoreParts) -> StoreParts:
    """A store in which Ada has an adapter of bank A."""
    await parts.put("ada", "text")
    await submitted(parts.jobs, ADA, bank=A)
    await trained(parts, A)
    return parts


def served(own: str, *, secret: str = SECRET, **named: str) -> ServedBanks:
    """Which bank serves whom: Ada's tenant and one more, some of which name banks."""
    ring = KeyRing(1, [access_key(tenant, "app", tenant, Scope) for tenant in (TENANT, "acme")], named)
    return ServedBanks(ring, own, Tenants(secret, "default"), "default")


async def readapted(parts: StoreParts, bank: str, served: ServedBanks | None = None, *, room: int = 2) -> ReadaptTally:
    """What one run of `mta readapt` does while a bank is served, to everybody where nothing else is said."""
    manifest: Any = SimpleNamespace(short=bank, embedder=SimpleNamespace(id=EMBEDDER), room=room, common=True)
    budget = JobBudget(max_tokens=1234, max_seconds=56)
    stores = parts.jobs, parts.adapters, parts.profiles
    return await Readapting(*stores, manifest=manifest, at_a_time=4, budget=budget, served=served).run()


async def trained(parts: StoreParts, bank: str, *, better: bool = True) -> Job:
    """Have a worker of a bank train the job that there is."""
    worker = WorkerSteps(parts, bank)
    await worker.take()
    await worker.claim()
    assert await (worker.promote() if better else worker.reject())
    return (await parts.jobs.jobs(ADA))[-1]


async def test_whoever_moves_back_and_forth_is_adapted_each_time(parts: StoreParts) -> None:
    (before,) = await parts.jobs.jobs(ADA)
    for move, bank in enumerate([B, A, B, A]):
        assert await readapted(parts, bank) == ReadaptTally(queued=1)
        assert await readapted(parts, bank) == ReadaptTally(queued=1)  # an interrupted run may be started again
        job = await trained(parts, bank)
        assert (job.id.number - before.id.number, job.bank, job.state) == (move + 1, bank, JobState.SUCCEEDED)
        assert {name for name, count in (await parts.adapters.adapted()).items() if count} == {bank}
        assert await readapted(parts, bank) == ReadaptTally()


async def test_a_job_that_came_to_nothing_is_tried_again_by_the_next_run(parts: StoreParts) -> None:
    (before,) = await parts.jobs.jobs(ADA)
    for number in (before.id.number + 1, before.id.number + 2):
        assert await readapted(parts, B) == ReadaptTally(queued=1)
        assert (await trained(parts, B, better=False)).id.number == number
    assert {name for name, count in (await parts.adapters.adapted()).items() if count} == {A}


async def test_who_was_erased_or_has_no_samples_leaves_the_list(parts: StoreParts) -> None:
    await parts.profiles.erase(ADA, 1 << 52, 0)
    assert await readapted(parts, B) == ReadaptTally(settled=1)
    assert await readapted(parts, B) == ReadaptTally()


async def test_a_bank_that_leaves_users_no_rank_makes_no_jobs_that_must_fail(parts: StoreParts) -> None:
    with pytest.raises(BankError, match=f"bank {B} leaves users no rank.*--user-rank"):
        await readapted(parts, B, room=0)
    assert await parts.jobs.next_job(B, 0.05) is None


async def test_whom_another_bank_serves_is_left_alone_and_stays_on_the_list_of_it(parts: StoreParts) -> None:
    for by_other in (served(B, **{TENANT: A}), served(A, acme=B), served(B, acme=A, secret="not the gateways' own")):
        assert await readapted(parts, B, by_other) == ReadaptTally(settled=1)
    assert await parts.jobs.next_job(B, 0.05) is None
    assert await parts.adapters.adapted() == {A: 1}


async def test_whom_the_bank_serves_gets_a_job_whether_their_tenant_names_it_or_none(parts: StoreParts) -> None:
    for bank, by_bank in ((B, served(A, **{TENANT: B})), (A, served(A, acme=B))):
        assert await readapted(parts, bank, by_bank) == ReadaptTally(queued=1)
        assert (await trained(parts, bank)).state is JobState.SUCCEEDED


async def test_its_jobs_have_the_budget_of_all_others(parts: StoreParts) -> None:
    await readapted(parts, B)
    job_id = await parts.jobs.next_job(B, 1)
    assert job_id is not None
    job = await parts.jobs.job(job_id)
    config = decode_config(job.config)
    assert (config.max_tokens, config.max_seconds) == (1234, 56)
