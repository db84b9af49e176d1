"""API keys on Redis: one hash for all (`server/store/redis/keys.py`), read as a whole and changed by scripts."""

from __future__ import annotations

import orjson

from server.errors import Unavailable
from server.store.redis import keys
from server.store.redis.job_scripts import ALLOW_OOM
from server.store.redis.servers.connection import RedisConnection, readable
from server.store.tenants.access_keys import AccessKey, KeyRing, Scope
from server.store.tenants.rates import Allowance

_REVISION = "revision"
_REVOKED = "revoked:"
_BANK = "bank:"

# KEYS: the hash. ARGV: digest, record, whether it must be the first. A repeated call changes nothing.
_ADD = (
    ALLOW_OOM
    + """
local before = redis.call('HGET', KEYS[1], ARGV[1])
if not before and ARGV[3] == '1' and redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], before or ARGV[2])
if before then return 1 end
redis.call('HINCRBY', KEYS[1], 'revision', 1)
return 1
"""
)

# KEYS: the hash. ARGV: digest, when. A repeated call changes nothing.
_REVOKE = (
    ALLOW_OOM
    + """
if redis.call('HEXISTS', KEYS[1], ARGV[1]) == 0 then return 0 end
local before = redis.call('HGET', KEYS[1], 'revoked:' .. ARGV[1])
redis.call('HSET', KEYS[1], 'revoked:' .. ARGV[1], before or ARGV[2])
if before then return 0 end
redis.call('HINCRBY', KEYS[1], 'revision', 1)
return 1
"""
)

# KEYS: the hash. ARGV: the tenant's field, the bank.
_NAME_BANK = """
if ARGV[2] == '' then redis.call('HDEL', KEYS[1], ARGV[1]) else redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
redis.call('HINCRBY', KEYS[1], 'revision', 1)
"""


class RedisAccessKeys:
    """`server.store.tenants.access_keys.AccessKeys` on Redis.

    Args:
        connection: checked, or to be checked before the first write.
    """

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def revision(self) -> int:
        found = await self._connection.run(lambda redis: redis.hget(keys.ACCESS_KEYS, _REVISION))
        with readable():
            return int(found or 0)

    async def all(self) -> KeyRing:
        found = await self._connection.run(lambda redis: redis.hgetall(keys.ACCESS_KEYS))
        with readable():
            fields = {name.decode(): raw for name, raw in found.items()}
            revision = int(fields.pop(_REVISION, 0))
            revoked = {digest: int(when_ms) for digest, when_ms in _taken(fields, _REVOKED)}
            banks = {tenant: bank.decode() for tenant, bank in _taken(fields, _BANK)}
            known = [_decoded(digest, raw, revoked.get(digest)) for digest, raw in fields.items()]
        if bool(known) != bool(revision):
            raise Unavailable("the store holds a part of the API keys only", code="store_corrupt")
        return KeyRing(revision, sorted(known, key=lambda key: (key.created_ms, key.digest)), banks)

    async def add(self, key: AccessKey, *, only_first: bool = False) -> bool:
        record = {
            "name": key.name,
            "tenant": key.tenant,
            "scopes": sorted(key.scopes),
            "last": key.last,
            "created_ms": key.created_ms,
            "allowance": key.allowance.said,
        }
        arguments = (key.digest, orjson.dumps(record), int(only_first))
        return bool(await self._connection.write(_ADD, (keys.ACCESS_KEYS,), *arguments))

    async def name_bank(self, tenant: str, bank: str) -> None:
        await self._connection.write(_NAME_BANK, (keys.ACCESS_KEYS,), f"{_BANK}{tenant}", bank)

    async def revoke(self, digest: str, now_ms: int) -> bool:
        return bool(await self._connection.write(_REVOKE, (keys.ACCESS_KEYS,), digest, now_ms))


def _taken(fields: dict[str, bytes], beginning: str) -> list[tuple[str, bytes]]:
    """The fields with a beginning, which is taken off, out of all fields."""
    names = [name for name in fields if name.startswith(beginning)]
    return [(name.removeprefix(beginning), fields.pop(name)) for name in names]


def _decoded(digest: str, raw: bytes, revoked_ms: int | None) -> AccessKey:
    record = orjson.loads(raw)
    scopes = frozenset(map(Scope, record["scopes"]))
    known = {name: value for name, value in record.get("allowance", {}).items() if name in Allowance.__slots__}
    return AccessKey(
        digest,
        record["name"],
        record["tenant"],
        scopes,
        record["last"],
        record["created_ms"],
        revoked_ms,
        Allowance(**known),
    )
