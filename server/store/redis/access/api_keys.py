"""API keys on Redis: one hash for all (`server/store/redis/keys.py`), read as a whole and changed by scripts.

The first change gives the ring its id; a ring of an earlier version gets it with the next.
"""

from __future__ import annotations

import secrets

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

# KEYS: the hash, the ring's id. ARGV: an id, digest, record, whether it must be the first. A repeated call changes
# nothing.
_ADD = (
    ALLOW_OOM
    + """
local before = redis.call('HGET', KEYS[1], ARGV[2])
if not before and ARGV[4] == '1' and redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], ARGV[2], before or ARGV[3])
if before then return 1 end
redis.call('HINCRBY', KEYS[1], 'revision', 1)
redis.call('SETNX', KEYS[2], ARGV[1])
return 1
"""
)

# KEYS: the hash, the ring's id. ARGV: an id, digest, when. A repeated call changes nothing.
_REVOKE = (
    ALLOW_OOM
    + """
if redis.call('HEXISTS', KEYS[1], ARGV[2]) == 0 then return 0 end
local before = redis.call('HGET', KEYS[1], 'revoked:' .. ARGV[2])
redis.call('HSET', KEYS[1], 'revoked:' .. ARGV[2], before or ARGV[3])
if before then return 0 end
redis.call('HINCRBY', KEYS[1], 'revision', 1)
redis.call('SETNX', KEYS[2], ARGV[1])
return 1
"""
)

# KEYS: the hash, the ring's id. ARGV: an id, the tenant's field, the bank.
_NAME_BANK = """
if ARGV[3] == '' then redis.call('HDEL', KEYS[1], ARGV[2]) else redis.call('HSET', KEYS[1], ARGV[2], ARGV[3]) end
redis.call('HINCRBY', KEYS[1], 'revision', 1)
redis.call('SETNX', KEYS[2], ARGV[1])
"""


class RedisAccessKeys:
    """`server.store.tenants.access_keys.AccessKeys` on Redis.

    Args:
        connection: checked, or to be checked before the first write.
    """

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def revision(self) -> tuple[str, int]:
        async with self._connection.pipeline() as pipe:
            pipe.get(keys.ACCESS_RING)
            pipe.hget(keys.ACCESS_KEYS, _REVISION)
            ring, found = await pipe.execute()
        with readable():
            return (ring or b"").decode(), int(found or 0)

    async def all(self) -> KeyRing:
        async with self._connection.pipeline() as pipe:
            pipe.get(keys.ACCESS_RING)
            pipe.hgetall(keys.ACCESS_KEYS)
            ring, found = await pipe.execute()
        with readable():
            fields = {name.decode(): raw for name, raw in found.items()}
            revision = int(fields.pop(_REVISION, 0))
            revoked = {digest: int(when_ms) for digest, when_ms in _taken(fields, _REVOKED)}
            banks = {tenant: bank.decode() for tenant, bank in _taken(fields, _BANK)}
            known = [_decoded(digest, raw, revoked.get(digest)) for digest, raw in fields.items()]
        if bool(known) != bool(revision):
            raise Unavailable("the store holds a part of the API keys only", code="store_corrupt")
        ordered = sorted(known, key=lambda key: (key.created_ms, key.digest))
        return KeyRing(revision, ordered, banks, (ring or b"").decode())

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
        return bool(await self._change(_ADD, *arguments))

    async def name_bank(self, tenant: str, bank: str) -> None:
        await self._change(_NAME_BANK, f"{_BANK}{tenant}", bank)

    async def revoke(self, digest: str, now_ms: int) -> bool:
        return bool(await self._change(_REVOKE, digest, now_ms))

    async def _change(self, script: str, *arguments: object) -> object:
        names = (keys.ACCESS_KEYS, keys.ACCESS_RING)
        return await self._connection.write(script, names, secrets.token_hex(8), *arguments)


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
