"""The store on Redis 7.2+ or Valkey 8+.

Keys, all of one user in one cluster slot::

    mta:{<user key>}:profile   string   the record (`server/profile_record.py`)
    mta:{<user key>}:items     hash     item id → JSON
    mta:{<user key>}:vectors   hash     item id → embedder id and fp16 embedding

A commit is one Lua script that compares the record with the one that the change was made from and writes only if they
are the same, so that every change is one atomic step and concurrent writers never overwrite each other. The script and,
where the server does not fsync at once by itself, `WAITAOF` travel in one round trip on one connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError, RedisError, ResponseError

from adapters.errors import MtaError
from server.errors import Unavailable
from server.profile_record import (
    decode_item,
    decode_profile,
    decode_vector,
    encode_item,
    encode_profile,
    encode_vector,
)
from server.store import Change, Durability, Erased, Profile, Snapshot

CONNECTIONS = 64
CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 2.0
WAITAOF_TIMEOUT_MS = 10_000
WRITE_TIMEOUT_S = 15.0

# KEYS: record, items, vectors. ARGV: the record expected, the new record, how many puts, then (id, item, vector) for
# each, an empty item or vector meaning "as it is", then the ids to drop.
_COMMIT = """
local current = redis.call('GET', KEYS[1]) or ''
if current == ARGV[2] then return 1 end
if current ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
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

# Answers how many items and how many keys there were.
_ERASE = """
local items = redis.call('HLEN', KEYS[2])
return {items, redis.call('DEL', unpack(KEYS))}
"""

_NOT_DURABLE = (
    "Redis does not promise to keep what it acknowledges: set `appendonly yes` and `appendfsync always` (or "
    "`everysec`; Redis 7.2+ or Valkey 8+), or MTA_REQUIRE_DURABLE_STORE=false to accept losses"
)


class RedisStore:
    """`server.store.ProfileStore` on Redis.

    Args:
        url: as in redis-py: `redis://`, `rediss://` or `unix://`.
        require_durable: whether a server that keeps no append-only file is refused.

    Raises:
        MtaError: when the URL is none.
    """

    def __init__(self, url: str, *, require_durable: bool = True) -> None:
        try:
            # One retry: a connection that idled through a restart of the server fails once. Commits may be repeated.
            pool = redis.BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=READ_TIMEOUT_S,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                socket_timeout=WRITE_TIMEOUT_S,
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError as error:
            raise MtaError(f"MTA_REDIS_URL is no Redis URL: {error}") from error
        self._redis: Any = redis.Redis(connection_pool=pool)  # Any: its annotations mix sync and async answers
        self._require_durable = require_durable
        self._durability = Durability.NONE

    @property
    def durability(self) -> Durability:
        return self._durability

    async def check(self) -> Durability:
        async with _translated(READ_TIMEOUT_S):
            self._durability = await self._find_durability()
        if self._durability is Durability.NONE and self._require_durable:
            raise Unavailable(_NOT_DURABLE, code="store_not_durable")
        return self._durability

    async def load(self, key: str) -> Profile | None:
        async with _translated(READ_TIMEOUT_S):
            record = await self._redis.get(_names(key)[0])
        return _decoded(record)

    async def read(self, key: str) -> Snapshot:
        profile, items, vectors = _names(key)
        async with _translated(WRITE_TIMEOUT_S), self._redis.pipeline(transaction=True) as pipe:
            record, raw_items, raw_vectors = await pipe.get(profile).hgetall(items).hgetall(vectors).execute()
        decoded = sorted(
            ((name.decode(), decode_item(raw)) for name, raw in raw_items.items()), key=lambda pair: pair[1].order
        )
        return Snapshot(
            version=record or b"",
            profile=_decoded(record),
            items=dict(decoded),
            vectors={name.decode(): decode_vector(raw) for name, raw in raw_vectors.items()},
        )

    async def commit(self, key: str, version: bytes, change: Change) -> bool:
        items = {name: encode_item(item) for name, item in change.put_items.items()}
        vectors = {name: encode_vector(vector) for name, vector in change.put_vectors.items()}
        puts = list(dict.fromkeys((*items, *vectors)))
        arguments = [version, encode_profile(change.profile), len(puts)]
        for name in puts:
            arguments += [name, items.get(name, b""), vectors.get(name, b"")]
        return bool(await self._write(_COMMIT, key, *arguments, *change.drop))

    async def erase(self, key: str) -> Erased | None:
        erased_items, erased_keys = await self._write(_ERASE, key)
        return Erased(items=erased_items, keys=erased_keys) if erased_keys else None

    async def stored_bytes(self, key: str) -> int:
        async with _translated(READ_TIMEOUT_S), self._redis.pipeline(transaction=False) as pipe:
            for name in _names(key):
                pipe.execute_command("MEMORY USAGE", name, "SAMPLES", 0)
            return sum(size or 0 for size in await pipe.execute())

    async def close(self) -> None:
        await self._redis.aclose()
        await self._redis.connection_pool.disconnect()

    async def _write(self, script: str, key: str, *arguments: Any) -> Any:
        """Run a script on a user's keys; return its answer once its writes are on disk."""
        if self._durability is Durability.NONE and self._require_durable:
            raise Unavailable(_NOT_DURABLE, code="store_not_durable")
        names = _names(key)
        async with _translated(WRITE_TIMEOUT_S), self._redis.pipeline(transaction=False) as pipe:
            pipe.eval(script, len(names), *names, *arguments)
            if self._durability is Durability.WAITAOF:
                pipe.execute_command("WAITAOF", 1, 0, WAITAOF_TIMEOUT_MS)
            answer, *fsynced = await pipe.execute()
        if fsynced and fsynced[0][0] < 1:
            raise Unavailable(
                f"Redis did not confirm within {WAITAOF_TIMEOUT_MS // 1000} s that the write is on disk: repeat it",
                code="store_not_durable",
            )
        return answer

    async def _find_durability(self) -> Durability:
        try:
            config = await self._redis.config_get("appendonly", "appendfsync")
        except (NoPermissionError, ResponseError):  # managed services hide CONFIG
            return await self._try_waitaof()
        found = {_text(name): _text(value) for name, value in config.items()}
        if found.get("appendonly") != "yes" or found.get("appendfsync") == "no":
            return Durability.NONE  # with `no` the server never learns what is on disk: WAITAOF would wait for ever
        return Durability.ALWAYS if found.get("appendfsync") == "always" else await self._try_waitaof()

    async def _try_waitaof(self) -> Durability:
        """WAITAOF of a connection that wrote nothing answers at once: an error where there is no file to wait for."""
        try:
            await self._redis.execute_command("WAITAOF", 1, 0, 1)
        except ResponseError:
            return Durability.NONE
        return Durability.WAITAOF


def _names(key: str) -> tuple[str, str, str]:
    """The names of a user's keys; the braces keep them in one cluster slot."""
    prefix = f"mta:{{{key}}}:"
    return f"{prefix}profile", f"{prefix}items", f"{prefix}vectors"


def _decoded(record: bytes | None) -> Profile | None:
    if not record:
        return None
    try:
        return decode_profile(record)
    except ValueError as error:
        raise Unavailable("the store holds a record that this gateway cannot read", code="store_corrupt") from error


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value


@asynccontextmanager
async def _translated(timeout_s: float) -> AsyncIterator[None]:
    """The one place where Redis's errors become ours, and where its silence ends."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        message = f"the store gave no answer within {timeout_s:g} s: send the request again"
        raise Unavailable(message, code="store_unavailable") from error
    except (RedisError, OSError) as error:
        raise Unavailable("the store cannot be used now: send the request again", code="store_unavailable") from error
