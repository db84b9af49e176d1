"""The table of keys in `server/store/redis/keys.py` says what the stores write: names, types, and what expires."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np
import redis.asyncio as redis

from bench.rig.cluster import ValkeyCluster
from bench.rig.valkey import ValkeyProcess
from server.store.profile_record import StoredVector
from server.store.queue import UserQueue
from server.store.redis import keys
from server.store.tenants.access_keys import AccessKeys, Scope, access_key, new_secret
from server.store.tenants.rates import Rate, Rates, Use
from tests.support.store_parts import BANK, EMBEDDER, KEYS, StoreParts, WorkerSteps, put_of, submitted

_ROW = re.compile(r"^    (mta:.+?)  +(string|hash|list|set|zset)  (.+)$", re.MULTILINE)
_PARTS = {
    "<user key>": "[a-z2-7]{26}",
    "<n>": "[0-9]+",
    "<queue>": f"(jobs|sign):{BANK}",
    "<bank>": BANK,
    "<server>": "[0-9a-f]{40}",
    "<what>": "[a-z]+",
    "<owner>": "(key|user|tenant)-[^/]+",
    "<engines>": "[0-9a-f]{16}",
}
_EXPIRES = re.compile("7 days|after (one window|the last lease)")
WEEK_S = 7 * 24 * 3600


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table: a name with its parts, a type, and whether it says that the key expires."""

    name: str
    type: str
    expires: bool

    def fits(self, name: str) -> bool:
        pattern = re.escape(self.name).replace(r"\ ", " ")
        for part, meant in _PARTS.items():
            pattern = pattern.replace(part, meant)
        return re.fullmatch(pattern, name) is not None


def table() -> list[Row]:
    assert keys.__doc__
    rows = _ROW.findall(keys.__doc__)
    return [
        Row(name, kind, _EXPIRES.search(rest) is not None) for names, kind, rest in rows for name in names.split(", ")
    ]


async def test_whatever_is_written_stands_in_the_table(
    server: ValkeyProcess | ValkeyCluster, parts: StoreParts, raw: redis.Redis
) -> None:
    for user in ("ada", "bob"):
        key = KEYS.key(user)
        snapshot = await parts.profiles.read(key)
        change = replace(put_of(user, "text", snapshot), put_vectors={"it": StoredVector(EMBEDDER, np.ones(4, "f4"))})
        assert await parts.profiles.commit(key, snapshot.version, change)
        await submitted(parts.jobs, key)
        await parts.signing.add(key)
    await AccessKeys(parts.connection).add(access_key(new_secret(), "app", "acme", Scope))
    rates = Rates(parts.connection)
    assert (await rates.consume([Use(Rate("tokens", "user-x", 5), 1)])).counted
    for held in ("running/key-x", f"gateways/{'0' * 16}"):
        assert await rates.acquire(held, ["it"], 60)
    worker = WorkerSteps(parts)
    await worker.take()
    await worker.claim()
    assert await worker.promote()
    await worker.take_signing()
    await parts.signing.count_attempt(KEYS.key("ada"))
    await UserQueue(parts.connection, "jobs", BANK).reserve(KEYS.key("bob"), background=True)
    await parts.erase("bob")

    seen, expiring = set(), set()
    for name in [name.decode() async for name in raw.scan_iter()]:
        (row,) = [row for row in table() if row.fits(name)]
        assert (name, (await raw.type(name)).decode()) == (name, row.type)
        left_s = await raw.ttl(name)
        assert left_s == -1 or (row.expires and left_s <= WEEK_S), name
        seen.add(row.name)
        expiring |= {row.name} if left_s > 0 else set()
    assert expiring == {row.name for row in table() if row.expires}
    of_the_other = "mta:{rewrite}" if isinstance(server, ValkeyCluster) else "mta:{rewrite}:<server>"
    assert seen == {row.name for row in table()} - {of_the_other}
