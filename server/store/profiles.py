"""Profiles: a user's record, items, vectors and epoch (keys: `server/store/redis/keys.py`).

A request needs only the record; items and vectors are needed for changes. A commit succeeds only if the record has not
changed since it was read. Erasing a user starts a new *epoch*. Each write names the epoch it saw at its start and is
refused if the epoch has changed, so writes in progress store nothing of an erased user. A user who moved to the key of
another secret leaves the epoch `><new key> <epoch>` (`rotation.py`), which refuses every write.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

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
from server.store.tenants.holdings import Held
from server.store.tenants.user_key import User

TOMBSTONE_S = 7 * 24 * 3600
UNKNOWN_TOMBSTONE_S = 600  # for an unknown user: longer than the body of any request takes to arrive
# COMMANDLOG exists from Valkey 8.1 on.
_CLEAR_LOGS = ("SLOWLOG RESET", "COMMANDLOG RESET large-request", "COMMANDLOG RESET large-reply")

# KEYS: record, items, vectors, epoch. ARGV: as named; id, item and vector of each put, empty if unchanged; ids to drop.
# Returns 1 if written, 0 if the record has changed, -1 if the user was erased.
_COMMIT = script("""
local expected, record, epoch, puts = unpack(ARGV, 1, 4)  -- all of them may be more than Lua's stack
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

# KEYS: as `keys.of_user`, the tombstone last. Returns the tombstone's fields except the epoch, or nothing if the user
# exists and the deadline has passed. A tombstone without counts belongs to an unknown user.
_ERASE = oom_script("""
local prefix, kept_jobs, known_s, unknown_s, epoch, until_ms, rewritten_by = unpack(ARGV)
local job_numbers, record, items, vectors, samples, feedback, learned = unpack(KEYS)
local adapter, tombstone = KEYS[#KEYS - 1], KEYS[#KEYS]
if now > tonumber(until_ms) and redis.call('EXISTS', unpack(KEYS, 1, #KEYS - 1)) > 0 then return {} end
local counts = {
  'items', redis.call('HLEN', items), 'samples', redis.call('LLEN', samples) + redis.call('HLEN', learned),
  'adapters', redis.call('EXISTS', adapter), 'feedback', redis.call('HLEN', feedback)
}
local jobs, banks, last = 0, {}, tonumber(redis.call('HGET', job_numbers, 'last') or 0)
for number = math.max(1, last - kept_jobs), last do
  banks[#banks + 1] = redis.call('HGET', prefix .. number, 'bank') or nil
  jobs = jobs + redis.call('DEL', prefix .. number)
end
local keys = jobs + redis.call('DEL', unpack(KEYS, 1, #KEYS - 1))
if keys > 0 then
  redis.call('HSET', tombstone, 'jobs', jobs, 'keys', keys, 'rewritten_by', rewritten_by,
    'banks', table.concat(banks, ' '), unpack(counts))
end
local mark = string.match(redis.call('HGET', tombstone, 'epoch') or '', '^>%w+ ') or ''
redis.call('HSET', tombstone, 'epoch', mark .. epoch)
local stays_s = tonumber(keys > 0 and known_s or unknown_s)
if mark ~= '' then redis.call('HSET', tombstone, 'until_ms', now + stays_s * 1000) end
if redis.call('TTL', tombstone) < stays_s then redis.call('EXPIRE', tombstone, stays_s) end
local counted = {'items', 'samples', 'jobs', 'adapters', 'keys', 'feedback'}
return redis.call('HMGET', tombstone, 'rewritten_by', 'banks', unpack(counted))
""")

# KEYS: record. Write it again unchanged: waiting for this write also waits for all earlier ones.
_WRITE_AGAIN = """
local current = redis.call('GET', KEYS[1])
if current then redis.call('SET', KEYS[1], current) end
return 1
"""

# KEYS: record, epoch.
_LOAD = "return {redis.call('GET', KEYS[1]), redis.call('HGET', KEYS[2], 'epoch')}"

# KEYS: record, items, vectors, epoch. Read atomically.
_READ = """
return {redis.call('GET', KEYS[1]), redis.call('HGETALL', KEYS[2]), redis.call('HGETALL', KEYS[3]),
  redis.call('HGET', KEYS[4], 'epoch')}
"""

# KEYS: record, items, vectors, samples, feedback, learned, adapter, jobs. ARGV: prefix of job names. Returns record and
# bytes, whether there is an adapter and whether one is being trained; nothing for an unknown user.
_MEASURE = """
local record, bytes = redis.call('GET', KEYS[1]), 0
if not record then return {} end
for i = 1, 7 do bytes = bytes + (redis.call('MEMORY', 'USAGE', KEYS[i], 'SAMPLES', 0) or 0) end
local last = redis.call('HGET', KEYS[8], 'last')
local state = last and redis.call('HGET', ARGV[1] .. last, 'state')
return {record, bytes, redis.call('EXISTS', KEYS[7]), (state == 'queued' or state == 'running') and 1 or 0}
"""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A consistent copy of a user's profile, items and vectors."""

    version: bytes  # record that `commit` compares; empty for an unknown user
    epoch: str  # id of the user's last erasure; empty if none is kept
    profile: Profile | None  # None for an unknown user
    items: Mapping[str, StoredItem]  # by id, oldest first
    vectors: Mapping[str, StoredVector]  # by item id; may be incomplete


@dataclass(frozen=True, slots=True)
class Change:
    """One commit: the new record, new or changed items and vectors by item id, and ids to remove."""

    profile: Profile
    put_items: Mapping[str, StoredItem]
    put_vectors: Mapping[str, StoredVector]
    drop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Erased:
    """Numbers of removed objects; `keys` counts Redis keys of all kinds."""

    items: int
    samples: int
    jobs: int
    adapters: int
    keys: int
    feedback: int


@dataclass(frozen=True, slots=True)
class Erasure:
    """An erasure as kept in the tombstone."""

    erased: Erased
    rewritten_by_ms: int  # latest time at which the data is gone from disk too, Unix time
    banks: tuple[str, ...] = ()  # banks (8 hex digits) of the removed jobs


class ProfileStore:
    """Stores profiles, by user key. Every method raises `Unavailable` if the store cannot be reached or refuses."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def load(self, key: str) -> Profile | None:
        record = await self._connection.run(lambda redis: redis.get(keys.profile(key)))
        with corrupt_if_undecodable():
            return decode_profile(record) if record else None

    async def read(self, key: str) -> Snapshot:
        names = (*_names(key), keys.epoch(key))
        answer = await self._connection.evaluate(_READ, names, timeout_s=WRITE_TIMEOUT_S)
        record, raw_items, raw_vectors, epoch = answer
        with corrupt_if_undecodable():
            return Snapshot(
                version=record or b"",
                epoch=split_mark(epoch)[1],
                profile=decode_profile(record) if record else None,
                items=_in_order(_pairs(raw_items)),
                vectors={name.decode(): decode_vector(raw) for name, raw in _pairs(raw_vectors).items()},
            )

    async def find(self, user: User) -> tuple[User, Profile | None, str]:
        """Return the user with the key they are stored under, the profile and the epoch, of one moment."""
        profile, _, epoch = await self._load(user.key)
        for other in user.keys:
            if profile or other == user.key:
                continue
            profile, moved_to, others_epoch = await self._load(other)
            if profile or moved_to != user.key:
                # Who is under neither key comes back under the first, whose tombstone may outlast the other's.
                return replace(user, key=other), profile, others_epoch or ("" if profile else epoch)
            profile, _, epoch = await self._load(user.key)  # the user may have moved since it was read first
        return user, profile, epoch

    async def moved_to(self, key: str) -> str:
        """Return the key that a user moved to; empty if the user has not."""
        return split_mark(await self._connection.run(lambda redis: redis.hget(keys.epoch(key), "epoch")))[0]

    async def _load(self, key: str) -> tuple[Profile | None, str, str]:
        record, epoch = await self._connection.evaluate(_LOAD, (keys.profile(key), keys.epoch(key)))
        with corrupt_if_undecodable():
            return decode_profile(record) if record else None, *split_mark(epoch)

    async def items(self, key: str) -> Mapping[str, StoredItem]:
        """Return the items by id, oldest first; empty for an unknown user."""
        raw_items = await self._connection.run(lambda redis: redis.hgetall(keys.items(key)), WRITE_TIMEOUT_S)
        with corrupt_if_undecodable():
            return _in_order(raw_items)

    async def epoch(self, key: str) -> str:
        """Return the id of the user's last erasure, or an empty string if none is kept."""
        return split_mark(await self._connection.run(lambda redis: redis.hget(keys.epoch(key), "epoch")))[1]

    async def commit(self, key: str, version: bytes, change: Change, epoch: str = "") -> bool:
        """Write a change of the snapshot of `version`. Return True once it is on disk, False if the user has changed.

        Raises `UserErased` if the user was erased since `epoch`, the user's epoch when work on the change began.
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
        """Wait until the state that `read` returned is durable: it may include writes that are not yet on disk."""
        if not self._connection.reads_are_durable:
            await self._connection.write(_WRITE_AGAIN, (keys.profile(key),))

    async def erase_if_unknown(self, key: str, epoch: str) -> tuple[bool, Erasure | None]:
        """Start this epoch if nothing is stored about a user, so that writes in progress are refused.

        Returns whether nothing is stored, and in that case the last erasure, if kept.
        """
        answer = await self._erase(key, 0, 0, epoch)
        return bool(answer), _erasure(answer)

    async def erase(self, key: str, deadline_ms: int, rewritten_by_ms: int, epoch: str = "") -> Erasure | None:
        """Remove everything stored about a user; the removal is on disk when this returns.

        `epoch` is a new one, random if empty. Returns the erasure; if nothing was stored, the last kept one; None for
        an unknown user. Also raises `Unavailable` if the store's clock is past `deadline_ms`, Unix time.
        """
        answer = await self._erase(key, deadline_ms, rewritten_by_ms, epoch or secrets.token_hex(8))
        if not answer:
            raise Unavailable("the store took too long to erase the user: send the request again")
        if (erasure := _erasure(answer)) is not None:
            await self._clear_command_logs()
        return erasure

    async def _clear_command_logs(self) -> None:
        """Clear the command logs of all servers, which contain user texts. Refusals are ignored."""
        with suppress(Unavailable):
            asked = [(server, command) for server in await self._connection.members() for command in _CLEAR_LOGS]
            await asyncio.gather(*(self._connection.send(*one) for one in asked), return_exceptions=True)

    async def measure(self, key: str) -> tuple[bytes, Held, bool]:
        """Return a user's record, empty for an unknown user, what they hold, and whether they have an open job."""
        of_user = (keys.samples, keys.feedback, keys.learned, keys.adapter, keys.jobs)
        names = (*_names(key), *(name(key) for name in of_user))
        found = await self._connection.evaluate(_MEASURE, names, keys.job_prefix(key))
        record, size_bytes, adapters, trains = found or (b"", 0, 0, 0)
        return record, Held(people=bool(record), bytes=size_bytes, adapters=max(adapters, trains)), bool(trains)

    async def _erase(self, key: str, deadline_ms: int, rewritten_by_ms: int, epoch: str) -> list[bytes | None]:
        arguments = (KEPT_JOBS, TOMBSTONE_S, UNKNOWN_TOMBSTONE_S, epoch, deadline_ms, rewritten_by_ms)
        answer: list[bytes | None] = await self._connection.write(
            _ERASE, keys.of_user(key), keys.job_prefix(key), *arguments
        )
        return answer


def split_mark(epoch: bytes | None) -> tuple[str, str]:
    """Return the key that a user moved to, if any, and the epoch in which that was."""
    text = (epoch or b"").decode()
    moved_to, _, before = text.removeprefix(">").partition(" ") if text.startswith(">") else ("", "", text)
    return moved_to, before


def _erasure(tombstone: list[bytes | None]) -> Erasure | None:
    """Decode a tombstone; None if it has no counts."""
    rewritten_by, banks, *counts = tombstone or [None, None]
    if rewritten_by is None or banks is None:
        return None
    erased = Erased(*(int(count or 0) for count in counts))
    return Erasure(erased, int(rewritten_by), tuple(sorted(set(banks.decode().split()))))


def _pairs(flat: list[bytes]) -> dict[bytes, bytes]:  # Lua returns a hash as field, value, field, value
    return dict(zip(flat[::2], flat[1::2], strict=True))


def _in_order(raw_items: Mapping[bytes, bytes]) -> dict[str, StoredItem]:
    decoded = ((name.decode(), decode_item(raw)) for name, raw in raw_items.items())
    return dict(sorted(decoded, key=lambda pair: pair[1].order))


def _names(key: str) -> tuple[str, str, str]:
    return keys.profile(key), keys.items(key), keys.vectors(key)
