"""Profiles on Redis.

Keys, all of one user in one cluster slot::

    mta:{<user key>}:profile   string   the record (`server/store/records.py`)
    mta:{<user key>}:items     hash     item id → JSON
    mta:{<user key>}:vectors   hash     item id → embedder id and fp16 embedding
    mta:{<user key>}:erased    string   tombstone: there was such a user; goes by itself, or when they come back

A commit is one Lua script that compares the record with the one that the change was made from and writes only if they
are the same, so that every change is one atomic step and concurrent writers never overwrite each other.
"""

from __future__ import annotations

from collections.abc import Mapping

from server.errors import Unavailable
from server.store.jobs import KEPT_JOBS
from server.store.profiles import Change, Erased, Profile, Snapshot, StoredItem
from server.store.records import (
    decode_item,
    decode_profile,
    decode_vector,
    encode_item,
    encode_profile,
    encode_vector,
)
from server.store.redis_connection import WRITE_TIMEOUT_S, RedisConnection, user_prefix

TOMBSTONE_S = 7 * 24 * 3600

# KEYS: record, items, vectors, tombstone. ARGV: the record expected, the new record, how many puts, then (id, item,
# vector) for each, an empty item or vector meaning "as it is", then the ids to drop.
_COMMIT = """
local current = redis.call('GET', KEYS[1]) or ''
if current == ARGV[2] then return 1 end
if current ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
redis.call('DEL', KEYS[4])
local drops = 4 + 3 * tonumber(ARGV[3])
for i = 4, drops - 1, 3 do
  if ARGV[i + 1] ~= '' then redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
  if ARGV[i + 2] ~= '' then redis.call('HSET', KEYS[3], ARGV[i], ARGV[i + 2]) end
end
for i = drops, #ARGV do
  redis.call('HDEL', KEYS[2], ARGV[i])
  redis.call('HDEL', KEYS[3], ARGV[i])
end
return 1
"""

# KEYS: tombstone, record, items, vectors, jobs, samples, adapter. ARGV: prefix of job names, how many jobs are kept,
# how long the tombstone stays (s). Answers how many items, samples, jobs and adapters there were, and how many keys.
_ERASE = """
local items, samples = redis.call('HLEN', KEYS[3]), redis.call('LLEN', KEYS[6])
local adapters, jobs = redis.call('EXISTS', KEYS[7]), 0
local last = tonumber(redis.call('HGET', KEYS[5], 'last') or 0)
for number = math.max(1, last - ARGV[2]), last do jobs = jobs + redis.call('DEL', ARGV[1] .. number) end
local keys = jobs + redis.call('DEL', unpack(KEYS, 2))
if keys > 0 then redis.call('SET', KEYS[1], '', 'EX', ARGV[3]) end
return {items, samples, jobs, adapters, keys}
"""


class RedisProfiles:
    """`server.store.profiles.ProfileStore` on Redis.

    Args:
        connection: checked, or to be checked before the first write.
    """

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def load(self, key: str) -> Profile | None:
        return _decoded(await self._connection.run(lambda redis: redis.get(_names(key)[0])))

    async def read(self, key: str) -> Snapshot:
        profile, items, vectors = _names(key)
        async with self._connection.pipeline(transaction=True, timeout_s=WRITE_TIMEOUT_S) as pipe:
            record, raw_items, raw_vectors = await pipe.get(profile).hgetall(items).hgetall(vectors).execute()
        return Snapshot(
            version=record or b"",
            profile=_decoded(record),
            items=_in_order(raw_items),
            vectors={name.decode(): decode_vector(raw) for name, raw in raw_vectors.items()},
        )

    async def items(self, key: str) -> Mapping[str, StoredItem]:
        name = _names(key)[1]
        return _in_order(await self._connection.run(lambda redis: redis.hgetall(name), WRITE_TIMEOUT_S))

    async def commit(self, key: str, version: bytes, change: Change) -> bool:
        items = {name: encode_item(item) for name, item in change.put_items.items()}
        vectors = {name: encode_vector(vector) for name, vector in change.put_vectors.items()}
        puts = list(dict.fromkeys((*items, *vectors)))
        arguments = [version, encode_profile(change.profile), len(puts)]
        for name in puts:
            arguments += [name, items.get(name, b""), vectors.get(name, b"")]
        names = (*_names(key), _tombstone(key))
        return bool(await self._connection.write(_COMMIT, names, *arguments, *change.drop))

    async def erase(self, key: str) -> Erased | None:
        prefix = user_prefix(key)
        names = (_tombstone(key), *_names(key), f"{prefix}jobs", f"{prefix}samples", f"{prefix}adapter")
        items, samples, jobs, adapters, keys = await self._connection.write(
            _ERASE, names, f"{prefix}job:", KEPT_JOBS, TOMBSTONE_S
        )
        return Erased(items, samples, jobs, adapters, keys) if keys else None

    async def stored_bytes(self, key: str) -> int:
        async with self._connection.pipeline(transaction=False) as pipe:
            for name in _names(key):
                pipe.execute_command("MEMORY USAGE", name, "SAMPLES", 0)
            return sum(size or 0 for size in await pipe.execute())


def _in_order(raw_items: Mapping[bytes, bytes]) -> dict[str, StoredItem]:
    decoded = ((name.decode(), decode_item(raw)) for name, raw in raw_items.items())
    return dict(sorted(decoded, key=lambda pair: pair[1].order))


def _names(key: str) -> tuple[str, str, str]:
    """The names of a profile's keys."""
    prefix = user_prefix(key)
    return f"{prefix}profile", f"{prefix}items", f"{prefix}vectors"


def _tombstone(key: str) -> str:
    return f"{user_prefix(key)}erased"


def _decoded(record: bytes | None) -> Profile | None:
    if not record:
        return None
    try:
        return decode_profile(record)
    except ValueError as error:
        raise Unavailable("the store holds a record that this gateway cannot read", code="store_corrupt") from error
