"""Profiles on Redis: record, items, vectors and epoch of a user (`server/store/redis/keys.py`).

A commit is one Lua script that compares the record with the one that the change was made from and writes only if they
are the same, so that every change is one atomic step and concurrent writers never overwrite each other. It also
compares epochs: a write that was in progress when its user was erased is refused, even on an empty record.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from contextlib import suppress

from server.errors import Unavailable, UserErased
from server.store.jobs import KEPT_JOBS
from server.store.profile_record import (
    decode_item,
    decode_profile,
    decode_vector,
    encode_item,
    encode_profile,
    encode_vector,
)
from server.store.profiles import Change, Erased, Erasure, Profile, Snapshot, StoredItem
from server.store.redis import keys
from server.store.redis.job_scripts import ALLOW_OOM, ERASED_SINCE, NOW
from server.store.redis.servers.base import WRITE_TIMEOUT_S
from server.store.redis.servers.connection import RedisConnection, readable

TOMBSTONE_S = 7 * 24 * 3600
NOBODY_S = 600
"""How long it is remembered that nobody was erased: longer than any request takes whose body is still arriving."""

_FORGET = ("SLOWLOG RESET", "COMMANDLOG RESET large-request", "COMMANDLOG RESET large-reply")
"""The latter from Valkey 8.1 on, where the former is one of three such logs."""

# KEYS: record, items, vectors, epoch. ARGV as named, then id, item and vector of each put, empty where unchanged; then
# the ids to drop. Returns 1 if it is written, 0 if the record is a different one, -1 if the user was erased.
_COMMIT = (
    ERASED_SINCE
    + """
local expected, record, epoch, puts = unpack(ARGV)
local current = redis.call('GET', KEYS[1]) or ''
if current == record then
  redis.call('SET', KEYS[1], current)
  return 1
end
if erased_since(KEYS[4], epoch) then return -1 end
if current ~= expected then return 0 end
redis.call('SET', KEYS[1], record)
local drops = 5 + 3 * tonumber(puts)
for i = 5, drops - 1, 3 do
  local id, item, vector = unpack(ARGV, i, i + 2)
  if item ~= '' then redis.call('HSET', KEYS[2], id, item) end
  if vector ~= '' then redis.call('HSET', KEYS[3], id, vector) end
end
for i = drops, #ARGV do
  redis.call('HDEL', KEYS[2], ARGV[i])
  redis.call('HDEL', KEYS[3], ARGV[i])
end
return 1
"""
)

# KEYS: the tombstone, then all that is stored of the user. Returns what the tombstone then says, except the new epoch;
# nothing if there is somebody and it is too late. A tombstone without counts is that of a user who never existed.
_ERASE = (
    ALLOW_OOM
    + NOW
    + """
local prefix, kept_jobs, somebody_s, nobody_s, epoch, until_ms, rewritten_by = unpack(ARGV)
local tombstone, record, items, vectors, job_numbers, samples, adapter = unpack(KEYS)
if now > tonumber(until_ms) and redis.call('EXISTS', unpack(KEYS, 2)) > 0 then return {} end
local counts = {
  'items', redis.call('HLEN', items), 'samples', redis.call('LLEN', samples), 'adapters', redis.call('EXISTS', adapter)
}
local jobs, banks, last = 0, {}, tonumber(redis.call('HGET', job_numbers, 'last') or 0)
for number = math.max(1, last - kept_jobs), last do
  banks[#banks + 1] = redis.call('HGET', prefix .. number, 'bank') or nil
  jobs = jobs + redis.call('DEL', prefix .. number)
end
local keys = jobs + redis.call('DEL', unpack(KEYS, 2))
if keys > 0 then
  redis.call('HSET', tombstone, 'jobs', jobs, 'keys', keys, 'rewritten_by', rewritten_by,
    'banks', table.concat(banks, ' '), unpack(counts))
end
redis.call('HSET', tombstone, 'epoch', epoch)
local stays_s = tonumber(keys > 0 and somebody_s or nobody_s)
if redis.call('TTL', tombstone) < stays_s then redis.call('EXPIRE', tombstone, stays_s) end
return redis.call('HMGET', tombstone, 'items', 'samples', 'jobs', 'adapters', 'keys', 'rewritten_by', 'banks')
"""
)

# KEYS: record. It is written as it is: who waits for that waits for all that was written before.
_AGAIN = """
local current = redis.call('GET', KEYS[1])
if current then redis.call('SET', KEYS[1], current) end
return 1
"""

# KEYS: record, items, vectors, epoch. All of one moment.
_READ = """
return {redis.call('GET', KEYS[1]), redis.call('HGETALL', KEYS[2]), redis.call('HGETALL', KEYS[3]),
  redis.call('HGET', KEYS[4], 'epoch')}
"""


class RedisProfiles:
    """`server.store.profiles.ProfileStore` on Redis."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def load(self, key: str) -> Profile | None:
        record = await self._connection.run(lambda redis: redis.get(keys.profile(key)))
        with readable():
            return _decoded(record)

    async def read(self, key: str) -> Snapshot:
        names = (*_names(key), keys.epoch(key))
        answer = await self._connection.run(lambda redis: redis.eval(_READ, len(names), *names), WRITE_TIMEOUT_S)
        record, raw_items, raw_vectors, epoch = answer
        with readable():
            return Snapshot(
                version=record or b"",
                epoch=(epoch or b"").decode(),
                profile=_decoded(record),
                items=_in_order(_pairs(raw_items)),
                vectors={name.decode(): decode_vector(raw) for name, raw in _pairs(raw_vectors).items()},
            )

    async def items(self, key: str) -> Mapping[str, StoredItem]:
        raw_items = await self._connection.run(lambda redis: redis.hgetall(keys.items(key)), WRITE_TIMEOUT_S)
        with readable():
            return _in_order(raw_items)

    async def epoch(self, key: str) -> str:
        epoch = await self._connection.run(lambda redis: redis.hget(keys.epoch(key), "epoch"))
        return (epoch or b"").decode()

    async def commit(self, key: str, version: bytes, change: Change, epoch: str = "") -> bool:
        items = {name: encode_item(item) for name, item in change.put_items.items()}
        vectors = {name: encode_vector(vector) for name, vector in change.put_vectors.items()}
        puts = list(dict.fromkeys((*items, *vectors)))
        arguments = [version, encode_profile(change.profile), epoch, len(puts)]
        for name in puts:
            arguments += [name, items.get(name, b""), vectors.get(name, b"")]
        written = await self._connection.write(_COMMIT, (*_names(key), keys.epoch(key)), *arguments, *change.drop)
        if written < 0:
            raise UserErased
        return bool(written)

    async def settle(self, key: str) -> None:
        if not self._connection.shows_only_what_lasts:
            await self._connection.write(_AGAIN, (keys.profile(key),))

    async def erase_nobody(self, key: str) -> tuple[bool, Erasure | None]:
        answer = await self._erase(key, 0, 0)
        return bool(answer), _erasure(answer)

    async def erase(self, key: str, deadline_ms: int, rewritten_by_ms: int) -> Erasure | None:
        answer = await self._erase(key, deadline_ms, rewritten_by_ms)
        if not answer:
            raise Unavailable("the store took too long to erase the user: send the request again")
        if (erasure := _erasure(answer)) is not None:
            await self._forget_commands()
        return erasure

    async def _forget_commands(self) -> None:
        """Ask all servers to forget the commands that they log, with what people wrote; as far as they let us."""
        with suppress(Unavailable):
            asked = [(server, command) for server in await self._connection.members() for command in _FORGET]
            await asyncio.gather(*(self._connection.send(*one) for one in asked), return_exceptions=True)

    async def stored_bytes(self, key: str) -> int:
        async with self._connection.pipeline() as pipe:
            for name in _names(key):
                pipe.execute_command("MEMORY USAGE", name, "SAMPLES", 0)
            return sum(size or 0 for size in await pipe.execute())

    async def _erase(self, key: str, deadline_ms: int, rewritten_by_ms: int) -> list[bytes | None]:
        names = (keys.epoch(key), *_names(key), keys.jobs(key), keys.samples(key), keys.adapter(key))
        arguments = (KEPT_JOBS, TOMBSTONE_S, NOBODY_S, secrets.token_hex(8), deadline_ms, rewritten_by_ms)
        answer: list[bytes | None] = await self._connection.write(_ERASE, names, keys.job_prefix(key), *arguments)
        return answer


def _erasure(tombstone: list[bytes | None]) -> Erasure | None:
    """What a tombstone says was erased; None for one that says nothing of it."""
    said = [value for value in tombstone if value is not None]
    if not said:
        return None
    *counts, rewritten_by, banks = said
    return Erasure(Erased(*map(int, counts)), int(rewritten_by), tuple(sorted(set(banks.decode().split()))))


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:
    """A hash as Lua returns it: field, value, field, value."""
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _in_order(raw_items: Mapping[bytes, bytes]) -> dict[str, StoredItem]:
    decoded = ((name.decode(), decode_item(raw)) for name, raw in raw_items.items())
    return dict(sorted(decoded, key=lambda pair: pair[1].order))


def _names(key: str) -> tuple[str, str, str]:
    """The keys that a profile is stored under."""
    return keys.profile(key), keys.items(key), keys.vectors(key)


def _decoded(record: bytes | None) -> Profile | None:
    return decode_profile(record) if record else None
