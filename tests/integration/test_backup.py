"""Rehearsals: a store is copied under load and lost, and comes back on another kind of server, without the erased."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest
from redis import ConnectionError, Redis

from adapters.errors import MtaError
from bench.rig.processes import wait_until
from bench.rig.valkey import ValkeyProcess
from server.observability.audit import Act, audit_to, note, read_audit
from server.settings import Settings
from server.store import append_only_file
from server.store.backup import copying
from server.store.backup.folder import open_copy
from server.store.jobs import JobId
from server.store.redis import keys
from server.store.tenants.access_keys import Scope, digest_of
from server.store.tenants.rates import NO_OVERRIDES
from server.store.tenants.user_key import UserKeys
from server.supervisor.data_folder import DataFolder
from server.supervisor.services import valkey_part, valkey_url
from tests.support.calls import mta
from tests.support.gateway import SECRET, GatewayThread, Keyed, make_keys, metric
from tests.support.store_parts import StoreParts, WorkerSteps, Writing, change, stored, submitted, until_forgotten
from tests.support.valkeys.cluster import ValkeyCluster, ask

TENANT = "acme"
USERS = [f"person-{n}" for n in range(200)]
WRITING, ADAPTED, RUNNING, WAITING, ERASED = USERS[:8], USERS[8], USERS[9], USERS[10], USERS[11:31]
Store = ValkeyProcess | ValkeyCluster


def user_key(user: str) -> str:
    return UserKeys(SECRET, TENANT).key(user)


@pytest.fixture(params=["to-a-cluster", pytest.param("from-a-cluster", marks=pytest.mark.acceptance)])
def stores(request: pytest.FixtureRequest, memory: Path) -> Iterator[tuple[Store, Store]]:
    """The store that is lost, and an empty one."""
    kinds = (ValkeyProcess, ValkeyCluster) if request.param == "to-a-cluster" else (ValkeyCluster, ValkeyProcess)
    lost, empty = (kind(memory / request.param / str(place)).start() for place, kind in enumerate(kinds))
    yield lost, empty
    lost.kill()
    empty.kill()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "SETTLE_S", 0)


def test_restore_leaves_out_erased_users_and_revoked_keys(
    gateway_settings: Settings, stores: tuple[Store, Store], log: Path, tmp_path: Path
) -> None:
    lost, empty = stores
    secrets = make_keys(lost.url, dict.fromkeys(("kept", "revoked"), (TENANT, Scope, NO_OVERRIDES)))
    with (
        GatewayThread(gateway_settings, redis_url=lost.url) as gateway,
        Keyed(gateway, secrets).client("kept") as client,
    ):
        bank = gateway.parts.bank.manifest.short
        for user in ("erased-before", *USERS):
            item = {"id": "it", "text": f"a text of {user}"}
            client.put(f"/users/{user}/profile", json={"items": [item]}).raise_for_status()
        client.delete("/users/erased-before").raise_for_status()
        written = asyncio.run(copied_while_written(lost, bank, tmp_path / "copies"))
        for user in ERASED:
            client.delete(f"/users/{user}").raise_for_status()
        client.delete("/users/nobody")
        mta("keys", "revoke", digest_of(secrets["revoked"].encode())[:12], MTA_REDIS_URL=lost.url)
    lost.kill()

    (copy,) = (tmp_path / "copies").iterdir()
    said = mta("restore", copy, "--erased", log, MTA_REDIS_URL=empty.url)
    assert re.search(r"restored: 180 users as of .*; 20 who .* since stay erased, 1 API keys", said)
    asyncio.run(check_restored(empty, bank, written))
    with GatewayThread(gateway_settings, redis_url=empty.url) as gateway, ExitStack() as stack:
        client, refused = (stack.enter_context(Keyed(gateway, secrets).client(name)) for name in secrets)
        copied_s = partial(metric, client, "mta_store_copied_timestamp_seconds")
        wait_until(lambda: copied_s() == open_copy(copy).began_s, "the gateway to know how old the copy is")
        found = {user: client.get(f"/users/{user}").status_code for user in USERS[8:]}
        assert found == {user: httpx.codes.NOT_FOUND if user in ERASED else httpx.codes.OK for user in USERS[8:]}
        assert client.get(f"/users/{USERS[-1]}/export").json()["items"][0]["text"] == f"a text of {USERS[-1]}"
        assert refused.get(f"/users/{USERS[-1]}").status_code == httpx.codes.UNAUTHORIZED
    acts = [entry for entry in read_audit(log, {"key": "cli"}) if entry["act"] in ("backup", "restore")]
    assert [(entry["act"], entry["outcome"]) for entry in acts] == [
        *(("backup", "done"), ("restore", "begun"), ("restore", "done"))
    ]
    assert len({entry["copy"] for entry in acts}) == 1


def test_restore_erases_a_user_erased_under_the_next_secret(
    memory: Path, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = f"the secret that comes after it,{SECRET}"
    with ValkeyProcess(memory / "next") as server:
        asyncio.run(put(server, USERS[:2]))
        mta("backup", "--out", tmp_path / "copies", MTA_REDIS_URL=server.url)
        ask(server, "FLUSHALL")
        note(Act.ERASE, httpx.codes.OK.value, tenant=TENANT, user=UserKeys(both, TENANT).keys(USERS[0])[0])
        monkeypatch.setenv("MTA_SECRET", both)
        (copy,) = (tmp_path / "copies").iterdir()
        assert "restored: 1 users" in mta("restore", copy, "--erased", log, MTA_REDIS_URL=server.url)


def test_second_restore_run_erases_users_of_a_newer_log(
    memory: Path, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def left() -> list[str]:
        async with StoreParts.opened(server.url) as parts:
            await until_forgotten(parts.connection, USERS[0], server)
            return [user for user in USERS[:2] if await parts.profiles.load(user_key(user))]

    for name in ("INTERVAL_MS", "ERASE_MS", "CLOCK_SKEW_MS"):
        monkeypatch.setattr(append_only_file, name, 100 if name == "ERASE_MS" else 0)
    with ValkeyProcess(memory / "again") as server:
        asyncio.run(put(server, USERS[:2]))
        mta("backup", "--out", tmp_path / "copies", MTA_REDIS_URL=server.url)
        (copy,) = (tmp_path / "copies").iterdir()
        ask(server, "FLUSHALL")
        with monkeypatch.context() as patched, pytest.raises(MtaError, match="broken off"):
            patched.setattr("server.store.backup.restoring.Restore.settle", Mock(side_effect=MtaError("broken off")))
            mta("restore", copy, "--without-erasures", MTA_REDIS_URL=server.url)
        note(Act.ERASE, httpx.codes.OK.value, tenant=TENANT, user=user_key(USERS[0]))
        assert "restored: 1 users" in mta("restore", copy, "--erased", log, MTA_REDIS_URL=server.url)
        assert asyncio.run(left()) == USERS[1:2]


def test_the_data_folder_has_the_log_that_a_restore_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTA_AUDIT", raising=False)
    with closing(DataFolder.open(tmp_path / "data")) as data:
        server = subprocess.Popen(valkey_part(data, 100 << 20).command, stdout=subprocess.DEVNULL)
    here, out = ("--data", data.path), tmp_path / "copies"
    try:
        with closing(Redis.from_url(valkey_url(data.path) or "")) as raw:
            wait_until(lambda: is_up(raw), "Valkey to answer")
            (key_id,) = re.findall(r"key ([0-9a-f]{12}) ", mta("keys", "create", "app", *here))
            mta("backup", "--out", out, *here)
            mta("keys", "revoke", key_id, *here)
            raw.flushall()
            (copy,) = out.iterdir()
            assert "1 API keys stay revoked" in mta("restore", copy, "--erased", data.path / "audit.jsonl", *here)
            assert "key_revoked" in mta("audit", MTA_DATA_DIR=str(data.path))
    finally:
        server.terminate()
        server.wait()
        audit_to(None)


def is_up(raw: Redis) -> bool:
    with suppress(ConnectionError):
        return bool(raw.ping())
    return False


async def put(store: Store, users: Sequence[str]) -> None:
    async with StoreParts.opened(store.url) as parts:
        for user in users:
            await stored(parts.profiles, user_key(user), change("a", user_id=user))


def test_a_full_store_can_be_copied(memory: Path, tmp_path: Path, log: Path) -> None:
    with ValkeyProcess(memory / "full") as server:
        ask(server, "CONFIG SET", "maxmemory", 1)
        assert "the copy is complete, but" in mta("backup", "--out", tmp_path / "copies", MTA_REDIS_URL=server.url)
    (copy,) = (tmp_path / "copies").iterdir()
    assert open_copy(copy).users == 0


async def copied_while_written(store: Store, bank: str, out: Path) -> dict[str, int]:
    """Copy a store in use, where one user has an adapter, and two have jobs; returns what was acknowledged before."""
    async with StoreParts.opened(store.url) as parts:
        worker = WorkerSteps(parts, bank)
        await submitted(parts.jobs, user_key(ADAPTED), bank=bank)
        await worker.take()
        await worker.claim()
        assert await worker.promote()
        await submitted(parts.jobs, user_key(RUNNING), bank=bank)
        assert await parts.jobs.claim(await until_due(parts, bank), lease_s=2)
        for user in (WAITING, ERASED[0]):
            await submitted(parts.jobs, user_key(user), bank=bank)
        async with Writing(parts.profiles, [user_key(user) for user in WRITING]) as writing:
            await writing.goes_on()
            acknowledged = dict(writing.acknowledged)
            assert ": 200 users, " in await asyncio.to_thread(mta, "backup", "--out", out, MTA_REDIS_URL=store.url)
            await writing.goes_on()
        return acknowledged


async def check_restored(store: Store, bank: str, written: dict[str, int]) -> None:
    async with StoreParts.opened(store.url) as parts, store.client() as raw:
        for user, number in written.items():
            assert (await parts.profiles.load(user)).updated_ms >= number
        names = str([name async for name in raw.scan_iter()])
        assert {user: user_key(user) in names for user in USERS} == {user: user not in ERASED for user in USERS}
        assert [user async for user in parts.adapters.adapted_users(bank)] == [user_key(ADAPTED)]
        note = (await parts.profiles.load(user_key(ADAPTED))).adapter
        assert await parts.adapters.adapter_id(user_key(ADAPTED)) == note.id
        queued = await raw.zrange(keys.queue("jobs", bank)[0], 0, -1)
        assert {entry.decode() for entry in queued} == {user_key(RUNNING), user_key(WAITING)}
        jobs = [await until_due(parts, bank) for _ in (RUNNING, WAITING)]
        assert {job.user_key for job in jobs} == {user_key(RUNNING), user_key(WAITING)}
        assert await parts.jobs.next_job(bank, 0.5) is None


async def until_due(parts: StoreParts, bank: str) -> JobId:
    """The next job for a worker: what was running comes once its lease has ended."""
    while (job := await parts.jobs.next_job(bank, 1)) is None:
        pass
    return job
