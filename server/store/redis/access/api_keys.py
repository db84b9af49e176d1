"""API keys on Redis: one hash for all (`server/store/redis/keys.py`), read as a whole and changed by scripts."""

from __future__ import annotations

import secrets

import orjson

from server.errors import Unavailable
from server.store.redis import keys
from server.store.redis.job_scripts import ALLOW_OOM
from server.store.redis.servers.connection import RedisConnection, readable
from server.store.tenants.access_keys import AccessKey, KeyRing, Scope
from server.store.tenants.rates import Allowance

_RING, _REVISION, _REVOKED, _BANK = "ring", "revision", "revoked:", "bank:"

# KEYS of all: the hash. ARGV of all: an id for the ring, if it has none. A repeated call changes nothing.
_CHANGED = """
local function changed()
  redis.call('HINCRBY', KEYS[1], 'revision', 1)
  redis.call('HSETNX', KEYS[1], 'ring', ARGV[1])
end
"""

_ADD = (
    ALLOW_OOM
    + _CHANGED
    + """
local digest, record, only_first = unpack(ARGV, 2)
local before = redis.call('HGET', KEYS[1], digest)
if not before and only_first == '1' and redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], digest, before or record)
if not before then changed() end
return 1
"""
)

_REVOKE = (
    ALLOW_OOM
    + _CHANGED
    + """
local digest, now = unpack(ARGV, 2)
if redis.call('HEXISTS', KEYS[1], digest) == 0 then return 0 end
local before = redis.call('HGET', KEYS[1], 'revoked:' .. digest)
redis.call('HSET', KEYS[1], 'revoked:' .. digest, before or now)
if before then return 0 end
changed()
return 1
"""
)

_NAME_BANK = (
    _CHANGED
    + """
local field, bank = unpack(ARGV, 2)
if bank == '' then redis.call('HDEL', KEYS[1], field) else redis.call('HSET', KEYS[1], field, bank) end
changed()
"""
)


class RedisAccessKeys:
    """`server.store.tenants.access_keys.AccessKeys` on Redis."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def revision(self) -> tuple[str, int]:
        found = await self._connection.run(lambda redis: redis.hmget(keys.ACCESS_KEYS, _RING, _REVISION))
        with readable():
            return (found[0] or b"").decode(), int(found[1] or 0)

    async def all(self) -> KeyRing:
        found = await self._connection.run(lambda redis: redis.hgetall(keys.ACCESS_KEYS))
        with readable():
            fields = {name.decode(): raw for name, raw in found.items()}
            ring, revision = fields.pop(_RING, b"").decode(), int(fields.pop(_REVISION, 0))
            revoked = {digest: int(when_ms) for digest, when_ms in _pop(fields, _REVOKED)}
            banks = {tenant: bank.decode() for tenant, bank in _pop(fields, _BANK)}
            known = [_decoded(digest, raw, revoked.get(digest)) for digest, raw in fields.items()]
        if bool(known) != bool(revision):
            raise Unavailable("the store holds a part of the API keys only", code="store_corrupt")
        return KeyRing(revision, sorted(known, key=lambda key: (key.created_ms, key.digest)), banks, ring)

    async def add(self, key: AccessKey, *, only_first: bool = False) -> bool:
        record = {
            "name": key.name,
            "tenant": key.tenant,
            "scopes": sorted(key.scopes),
            "last": key.last,
            "created_ms": key.created_ms,
            "allowance": key.allowance.said,
        }
        return bool(await self._change(_ADD, key.digest, orjson.dumps(record), int(only_first)))

    async def name_bank(self, tenant: str, bank: str) -> None:
        await self._change(_NAME_BANK, f"{_BANK}{tenant}", bank)

    async def revoke(self, digest: str, now_ms: int) -> bool:
        return bool(await self._change(_REVOKE, digest, now_ms))

    async def _change(self, script: str, *arguments: object) -> object:
        return await self._connection.write(script, (keys.ACCESS_KEYS,), secrets.token_hex(8), *arguments)


def _pop(fields: dict[str, bytes], beginning: str) -> list[tuple[str, bytes]]:
    """The fields with a beginning, which is taken off, out of all fields."""
    names = [name for name in fields if name.startswith(beginning)]
    return [(name.removeprefix(beginning), fields.pop(name)) for name in names]


def _decoded(digest: str, raw: bytes, revoked_ms: int | None) -> AccessKey:
    record = orjson.loads(raw)
    return AccessKey(
        digest,
        record["name"],
        record["tenant"],
        frozenset(map(Scope, record["scopes"])),
        record["last"],
        record["created_ms"],
        revoked_ms,
        Allowance(**{name: value for name, value in record["allowance"].items() if name in Allowance.__slots__}),
    )
