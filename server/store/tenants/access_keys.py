"""API keys: one hash for all (`server/store/redis/keys.py`), read as a whole and changed by scripts.

A key is a secret that its owner alone has; what is kept recognises it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

import orjson

from adapters.errors import MtaError, excerpt
from server.errors import Unavailable
from server.store.durability import corrupt_if_undecodable
from server.store.redis import keys
from server.store.redis.scripts import oom_script
from server.store.tenants.rates import NO_OVERRIDES, Allowance

if TYPE_CHECKING:
    from server.store.redis.servers.connection import RedisConnection  # commands start without redis-py

PREFIX = "mta_"
SECRET_BYTES = 32
MIN_DISTINCT = 10  # 64 random hexadecimal characters are of more kinds, all but one in a billion
MAX_NAME_CHARS = 64
CREATE = "mta keys create"  # errors name it


class Scope(StrEnum):
    """What a key allows."""

    GENERATE = "generate"
    WRITE = "write"
    ADAPT = "adapt"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class AccessKey:
    """What is kept of an API key."""

    digest: str  # SHA-256 of the secret, 64 hex digits
    name: str
    tenant: str
    scopes: frozenset[Scope]
    last: str  # the secret's last four characters, to recognise it by
    created_ms: int  # Unix time
    revoked_ms: int | None = None  # since when it counts no more
    allowance: Allowance = NO_OVERRIDES

    @property
    def id(self) -> str:
        """The key's public name: of 256 random bits, hashed, it gives 48."""
        return self.digest[:12]


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All keys as they were at one moment."""

    revision: int  # grows with every change; 0 while no key has ever been made
    keys: Sequence[AccessKey]  # oldest first, revoked ones included
    banks: Mapping[str, str] = field(default_factory=dict)  # of tenants that name one, its 8 hex digits
    id: str = ""  # random, given with its first change


def new_secret() -> str:
    """A secret of 256 bits, with a beginning by which scanners find those that leaked."""
    return PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def checked_secret(text: str) -> str:
    """The operator's own secret; raises `MtaError`, without repeating it, when it is short or cannot be random."""
    if re.fullmatch(PREFIX + r"[A-Za-z0-9_-]{43,100}", text) and len(set(text.removeprefix(PREFIX))) >= MIN_DISTINCT:
        return text
    raise MtaError(
        f"MTA_FIRST_KEY must be `{PREFIX}` and 43 to 100 random letters, digits, `-` or `_`, and is not (it has "
        f'{len(text)} characters of {len(set(text))} kinds): `echo "{PREFIX}$(openssl rand -hex 32)"` makes one'
    )


def access_key(
    secret: str, name: str, tenant: str, scopes: Iterable[Scope], allowance: Allowance = NO_OVERRIDES
) -> AccessKey:
    """What is kept of a new secret; raises `MtaError` of a name or tenant that is none, and without a scope."""
    for what, text in (("a key's name", name), ("a tenant", tenant)):
        if not text.isprintable() or not 0 < len(text) <= MAX_NAME_CHARS:
            raise MtaError(f"{what} must be 1 to {MAX_NAME_CHARS} printable characters, got {excerpt(text)}")
    allowed = frozenset(scopes)
    if not allowed:
        raise MtaError(f"a key without a scope allows nothing: give it some of {', '.join(Scope)}")
    now_ms = time.time_ns() // 1_000_000
    digest = digest_of(secret.encode())
    return AccessKey(digest, name, tenant, allowed, secret[-4:], now_ms, allowance=allowance)


def digest_of(secret: bytes) -> str:
    """What is kept of a secret. It is random and long: a slow hash would add nothing."""
    return hashlib.sha256(secret).hexdigest()


_RING, _REVISION, _REVOKED, _BANK = "ring", "revision", "revoked:", "bank:"


def _script(body: str) -> str:
    """KEYS: the hash. ARGV: an id for the ring, if it has none, and more. A repeated call changes nothing."""
    return oom_script(_CHANGED + body)


_CHANGED = """
local function changed()
  redis.call('HINCRBY', KEYS[1], 'revision', 1)
  redis.call('HSETNX', KEYS[1], 'ring', ARGV[1])
end
"""

_ADD = _script("""
local digest, record, only_first = unpack(ARGV, 2)
local before = redis.call('HGET', KEYS[1], digest)
if not before and only_first == '1' and redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('HSET', KEYS[1], digest, before or record)
if not before then changed() end
return 1
""")

_REVOKE = _script("""
local digest, now = unpack(ARGV, 2)
if redis.call('HEXISTS', KEYS[1], digest) == 0 then return 0 end
local before = redis.call('HGET', KEYS[1], 'revoked:' .. digest)
redis.call('HSET', KEYS[1], 'revoked:' .. digest, before or now)
if before then return 0 end
changed()
return 1
""")

_SET_BANK = _script("""
local field, bank = unpack(ARGV, 2)
if bank == '' then redis.call('HDEL', KEYS[1], field) else redis.call('HSET', KEYS[1], field, bank) end
changed()
""")


class AccessKeys:
    """Keeps API keys. Every method raises `Unavailable` when the store cannot be reached or refuses.

    A key is never forgotten, only revoked: a store in which one was made never looks like one in which none was.
    """

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection

    async def revision(self) -> tuple[str, int]:
        """What `KeyRing.id` and `KeyRing.revision` would be."""
        found = await self._connection.run(lambda redis: redis.hmget(keys.ACCESS_KEYS, _RING, _REVISION))
        with corrupt_if_undecodable():
            return (found[0] or b"").decode(), int(found[1] or 0)

    async def all(self) -> KeyRing:
        found = await self._connection.run(lambda redis: redis.hgetall(keys.ACCESS_KEYS))
        with corrupt_if_undecodable():
            fields = {name.decode(): raw for name, raw in found.items()}
            ring, revision = fields.pop(_RING, b"").decode(), int(fields.pop(_REVISION, 0))
            revoked = {digest: int(when_ms) for digest, when_ms in _pop(fields, _REVOKED)}
            banks = {tenant: bank.decode() for tenant, bank in _pop(fields, _BANK)}
            known = [_decoded(digest, raw, revoked.get(digest)) for digest, raw in fields.items()]
        if bool(known) != bool(revision):
            raise Unavailable("the store holds a part of the API keys only", code="store_corrupt")
        return KeyRing(revision, sorted(known, key=lambda key: (key.created_ms, key.digest)), banks, ring)

    async def add(self, key: AccessKey, *, only_first: bool = False) -> bool:
        """Returns whether the key is kept, on disk: with `only_first` only if there is none, not even a revoked one."""
        record = {
            "name": key.name,
            "tenant": key.tenant,
            "scopes": sorted(key.scopes),
            "last": key.last,
            "created_ms": key.created_ms,
            "allowance": key.allowance.overrides,
        }
        return bool(await self._change(_ADD, key.digest, orjson.dumps(record), int(only_first)))

    async def set_bank(self, tenant: str, bank: str) -> None:
        """Have a tenant be served by a bank (8 hex digits; empty for the gateways' own); on disk when it returns."""
        await self._change(_SET_BANK, f"{_BANK}{tenant}", bank)

    async def revoke(self, digest: str, now_ms: int) -> bool:
        """Have a key count no more, on disk when it returns; returns whether it counted until now."""
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
