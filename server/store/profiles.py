"""Profiles: record, items, vectors and epoch of a user (keys: `server/store/redis/keys.py`).

The record alone serves a request; items and vectors serve the next change. A commit writes only if the record is the
one that the change was made from. Erasing a user starts a new *epoch*: a write names the epoch that it saw when it
began, and is refused when another has begun since, so what was in progress stores nothing of an erased user.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from server.errors import Unavailable, UserErased
from server.store.durability import corrupt_if_undecodable
from server.store.jobs import KEPT_JOBS
from server.store.profile_record import (
    Profile,
    StoredItem,
    StoredVector,
    decode_item,
    decode_profile,
    decode_vector,
    encode_item,
    encode_profile,
    encode_vector,
)
from server.store.redis import keys
from server.store.redis.scripts import oom_script, script
from server.store.redis.servers.base import WRITE_TIMEOUT_S
from server.store.redis.servers.connection import RedisConnection

TOMBSTONE_S = 7 * 24 * 3600
UNKNOWN_TOMBSTONE_S = 600  # of a user who was not there: longer than any request takes whose body is still arriving
# From Valkey 8.1 on the first is one of three such logs.
_FORGET = ("SLOWLOG RESET", "COMMANDLOG RESET large-request", "COMMANDLOG RESET large-reply")

# KEYS: record, items, vectors, epoch. ARGV as named, then id, item and vector of each put, empty where unchanged; then
# the ids to drop. Returns 1 if it is written, 0 if the record is a different one, -1 if the user was erased.
_COMMIT = script("""
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
""")

# KEYS: the tombstone, then all that is stored of the user. Returns what the tombstone then says, except the new epoch;
# nothing if there is somebody and it is too late. A tombstone without counts is that of a user who never existed.
_ERASE = oom_script("""
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
""")

# KEYS: record. It is written as it is: who waits for that waits for all that was written before.
_WRITE_AGAIN = """
local current = redis.call('GET', KEYS[1])
if current then redis.call('SET', KEYS[1], current) end
return 1
"""

# KEYS: record, items, vectors, epoch. All of one moment.
_READ = """
return {redis.call('GET', KEYS[1]), redis.call('HGETALL', KEYS[2]), redis.call('HGETALL', KEYS[3]),
  redis.call('HGET', KEYS[4], 'epoch')}
"""


# KEYS: some. Returns the memory that they take, bytes.
_BYTES = """
local bytes = 0
for _, key in ipairs(KEYS) do bytes = bytes + (redis.call('MEMORY', 'USAGE', key, 'SAMPLES', 0) or 0) end
return bytes
"""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A user's profile with its items and vectors, as they were at one moment."""

    version: bytes  # what `commit` compares; empty for an unknown user
    epoch: str  # identifies the user's last erasure; empty when none is remembered
    profile: Profile | None  # None for an unknown user
    items: Mapping[str, StoredItem]  # by id, oldest first
    vectors: Mapping[str, StoredVector]  # by item id; some or all may be missing


@dataclass(frozen=True, slots=True)
class Change:
    """What one commit writes: the record; items and vectors that are new or differ, by item id; ids to remove."""

    profile: Profile
    put_items: Mapping[str, StoredItem]
    put_vectors: Mapping[str, StoredVector]
    drop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Erased:
    """How much an erasure removed; `keys` are all of the store's, whatever they held."""

    items: int
    samples: int
    jobs: int
    adapters: int
    keys: int


@dataclass(frozen=True, slots=True)
class Erasure:
    """An erasure, as it is remembered."""

    erased: Erased
    rewritten_by_ms: int  # by when it is gone from the file on disk too, Unix time
    banks: tuple[str, ...] = ()  # the banks (8 hex digits) of the jobs that it removed


class ProfileStore:
    """Keeps profiles. Every method raises `Unavailable` when the store cannot be reached or refuses."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def load(self, key: str) -> Profile | None:
        """The record alone: all that a request needs."""
        record = await self._connection.run(lambda redis: redis.get(keys.profile(key)))
        with corrupt_if_undecodable():
            return decode_profile(record) if record else None

    async def read(self, key: str) -> Snapshot:
        """A consistent snapshot: what a change starts from."""
        names = (*_names(key), keys.epoch(key))
        answer = await self._connection.evaluate(_READ, names, timeout_s=WRITE_TIMEOUT_S)
        record, raw_items, raw_vectors, epoch = answer
        with corrupt_if_undecodable():
            return Snapshot(
                version=record or b"",
                epoch=(epoch or b"").decode(),
                profile=decode_profile(record) if record else None,
                items=_in_order(_pairs(raw_items)),
                vectors={name.decode(): decode_vector(raw) for name, raw in _pairs(raw_vectors).items()},
            )

    async def items(self, key: str) -> Mapping[str, StoredItem]:
        """The items alone, by id, oldest first; empty for an unknown user."""
        raw_items = await self._connection.run(lambda redis: redis.hgetall(keys.items(key)), WRITE_TIMEOUT_S)
        with corrupt_if_undecodable():
            return _in_order(raw_items)

    async def epoch(self, key: str) -> str:
        """Identifies the user's last erasure; empty when none is remembered."""
        epoch = await self._connection.run(lambda redis: redis.hget(keys.epoch(key), "epoch"))
        return (epoch or b"").decode()

    async def commit(self, key: str, version: bytes, change: Change, epoch: str = "") -> bool:
        """Write a change made from the snapshot of `version`, all or nothing: True when it is on disk, False when
        someone else changed the user meanwhile.

        Raises `UserErased` when the user has been erased since `epoch`, the user's when work on the change began.
        """
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

    async def wait_until_durable(self, key: str) -> None:
        """Return once what `read` has shown lasts: it may show a change that no disk or replica has yet."""
        if not self._connection.reads_are_durable:
            await self._connection.write(_WRITE_AGAIN, (keys.profile(key),))

    async def erase_if_unknown(self, key: str) -> tuple[bool, Erasure | None]:
        """If nothing is stored of a user, have writes in progress store nothing either.

        Returns whether nothing is stored, and if so, the last erasure that is remembered.
        """
        answer = await self._erase(key, 0, 0)
        return bool(answer), _erasure(answer)

    async def erase(self, key: str, deadline_ms: int, rewritten_by_ms: int) -> Erasure | None:
        """Remove everything stored about a user, on disk before it returns.

        Returns the erasure; if nothing was stored, the last one that is remembered; None for an unknown user. Raises
        `Unavailable` also when the store's clock is past `deadline_ms`, Unix time.
        """
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
        """Memory that the user's profile, items and vectors take in the store."""
        return int(await self._connection.evaluate(_BYTES, _names(key)))

    async def _erase(self, key: str, deadline_ms: int, rewritten_by_ms: int) -> list[bytes | None]:
        names = (keys.epoch(key), *_names(key), keys.jobs(key), keys.samples(key), keys.adapter(key))
        arguments = (KEPT_JOBS, TOMBSTONE_S, UNKNOWN_TOMBSTONE_S, secrets.token_hex(8), deadline_ms, rewritten_by_ms)
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
