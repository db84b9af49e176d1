"""API keys, of which the store keeps only hashes: one Redis hash, changed by scripts, and a list of its changes.

The revision grows with each change by a random step, so that two lines of changes, one of them lost in a failover, have
no revision in common. Processes of the version before see a larger revision and read everything.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from operator import methodcaller

import orjson

from adapters.errors import MtaError, excerpt
from server.errors import Unavailable
from server.store.base import Store, corrupt_if_undecodable, decode
from server.store.redis import keys
from server.store.redis.scripts import Script, script
from server.store.tenants.rates import NO_OVERRIDES, Allowance, Quota

PREFIX = "mta_"
SECRET_BYTES = 32
MIN_DISTINCT = 10  # all but one in a billion random strings of 64 hex digits have this many distinct ones
MAX_NAME_CHARS = 64
MAX_NOTE_CHARS = 200
CREATE = "mta keys create"  # named in error messages


class Scope(StrEnum):
    GENERATE = "generate"
    WRITE = "write"
    ADAPT = "adapt"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Policy:
    """How the requests of a key are treated: what a key is given, the store keeps and a gateway knows of it."""

    allowance: Allowance = NO_OVERRIDES
    learn: bool = False  # whether requests learn from messages unless they say otherwise
    history: bool = False  # whether OpenAI's conversations have `history: auto` unless they say otherwise
    refresh: int | None = None  # `Settings.refresh_samples` of the key's users; None: as the gateways' settings say
    holdout: float | None = None  # share of users answered one level lower; None: as the gateways' settings say
    keep_texts: bool | None = None  # whether users' texts stay stored; None: as the gateways' settings say


USUAL = Policy()


@dataclass(frozen=True, slots=True)
class AccessKey:
    """The stored record of an API key."""

    digest: str  # SHA-256 of the secret, 64 hex digits
    name: str
    tenant: str
    scopes: frozenset[Scope]
    last: str  # last four characters of the secret, shown to users
    created_ms: int  # Unix time
    revoked_ms: int | None = None  # time of revocation, Unix time
    policy: Policy = USUAL
    expires_ms: int | None = None  # time from which it is refused, Unix time; None: never
    note: str = ""  # the operator's

    @property
    def id(self) -> str:  # public
        return self.digest[:12]


@dataclass(frozen=True, slots=True)
class KeyRing:
    """A consistent copy of all keys, or what changed of it."""

    revision: int  # 0 if no key was ever created
    keys: Sequence[AccessKey]  # oldest first, revoked ones included
    banks: Mapping[str, str]  # 8 hex digits, by tenant; empty for a tenant that no longer has its own bank
    id: str  # random, created with the first change
    quotas: Mapping[str, Quota]  # by tenant; without limits for a tenant that no longer has one


def new_secret() -> str:
    """Return a random secret of 256 bits, with a prefix by which scanners find leaked keys."""
    return PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def checked_secret(text: str) -> str:
    """Return the operator's secret; raise `MtaError`, without quoting it, if it is short or clearly not random."""
    if re.fullmatch(PREFIX + r"[A-Za-z0-9_-]{43,100}", text) and len(set(text.removeprefix(PREFIX))) >= MIN_DISTINCT:
        return text
    raise MtaError(
        f"MTA_FIRST_KEY must be `{PREFIX}` followed by 43 to 100 random letters, digits, `-` or `_`; got {len(text)} "
        f'characters, {len(set(text))} of them distinct. Create one with `echo "{PREFIX}$(openssl rand -hex 32)"`'
    )


def checked_note(text: str) -> str:
    if len(text) > MAX_NOTE_CHARS or not text.isprintable():
        raise MtaError(f"a note must be at most {MAX_NOTE_CHARS} printable characters, got {excerpt(text)}")
    return text


def access_key(secret: str, name: str, tenant: str, scopes: Iterable[Scope], policy: Policy = USUAL) -> AccessKey:
    """Return the record for a new secret; raises `MtaError` if the name or tenant is invalid or no scope is given."""
    for what, text in (("a key's name", name), ("a tenant", tenant)):
        if not text.isprintable() or not 0 < len(text) <= MAX_NAME_CHARS:
            raise MtaError(f"{what} must be 1 to {MAX_NAME_CHARS} printable characters, got {excerpt(text)}")
    allowed = frozenset(scopes)
    if not allowed:
        raise MtaError(f"a key needs at least one scope: {', '.join(Scope)}")
    now_ms = time.time_ns() // 1_000_000
    digest = digest_of(secret.encode())
    return AccessKey(digest, name, tenant, allowed, secret[-4:], now_ms, policy=policy)


def digest_of(secret: bytes) -> str:
    """Return the stored hash of a secret. Secrets are long and random, so a slow hash would add nothing."""
    return hashlib.sha256(secret).hexdigest()


_RING, _REVISION, _REVOKED, _BANK, _QUOTA = "ring", "revision", "revoked:", "bank:", "quota:"

_ADD = script("access_keys/add", runs_when_full=True)
_REVOKE = script("access_keys/revoke", runs_when_full=True)
_SET = script("access_keys/set", runs_when_full=True)


class AccessKeys(Store):
    """Stores API keys. They are revoked, never deleted: a store that once had keys never looks like a new one."""

    async def revision(self) -> tuple[str, int]:
        """Return the current `KeyRing.id` and `KeyRing.revision`."""
        stored = await self._connection.run(lambda redis: redis.hmget(keys.ACCESS_KEYS, _RING, _REVISION))
        with corrupt_if_undecodable():
            return (stored[0] or b"").decode(), int(stored[1] or 0)

    async def all(self) -> KeyRing:
        stored = await self._connection.run(lambda redis: redis.hgetall(keys.ACCESS_KEYS))
        with corrupt_if_undecodable():
            ring = _decoded({name.decode(): raw for name, raw in stored.items()})
        if bool(ring.keys) != bool(ring.revision):
            raise Unavailable("the store holds only some of the API keys", code="store_corrupt")
        return ring

    async def changes(self, since: int, until: int) -> KeyRing | None:
        """Return what changed from one revision to another; None if that is not known, as after a failover."""
        listed = await self._connection.run(lambda redis: redis.lrange(keys.KEY_CHANGES, 0, -1))
        at, names = since, {_RING}
        for before, after, name in (line.decode().split(" ", 2) for line in listed):
            if at == int(before) and at != until:
                at = int(after)
                names |= {name, name.removeprefix(_REVOKED)}
        if at != until:
            return None
        fields = await self._connection.run(lambda redis: redis.hmget(keys.ACCESS_KEYS, list(names)))
        with corrupt_if_undecodable():
            return _decoded(dict(zip(names, fields, strict=True)) | {_REVISION: b"%d" % until})

    async def add(self, key: AccessKey, *, only_first: bool = False) -> bool:
        """Store a key; return whether it is stored. With `only_first` only if there is no key yet, revoked or not."""
        record = asdict(key)
        record |= record.pop("policy")
        raw = orjson.dumps(record, default=sorted)  # the scopes are a set
        return bool(await self._change(_ADD, key.digest, raw, int(only_first)))

    async def set_bank(self, tenant: str, bank: str) -> None:
        """Set the bank of a tenant (8 hex digits; empty for the gateways' own)."""
        await self._change(_SET, f"{_BANK}{tenant}", bank)

    async def set_quota(self, tenant: str, quota: Quota) -> None:
        await self._change(_SET, f"{_QUOTA}{tenant}", b"" if quota == Quota() else orjson.dumps(asdict(quota)))

    async def revoke(self, digest: str, now_ms: int) -> bool:
        """Revoke a key; return whether it was valid until now."""
        return bool(await self._change(_REVOKE, digest, now_ms))

    async def note_used(self, digests: Iterable[str], hour: int) -> None:
        """Store the hour (since 1970) of a use, without waiting for the disk."""
        hours = dict.fromkeys(digests, hour)
        await self._connection.run(methodcaller("hset", keys.USED_KEYS, mapping=hours))

    async def used(self) -> dict[str, int]:
        """Return the hour of each key's last use, by digest."""
        stored = await self._connection.run(methodcaller("hgetall", keys.USED_KEYS))
        return {digest.decode(): int(hour) for digest, hour in stored.items()}

    async def _change(self, script: Script, *arguments: object) -> object:
        given = (secrets.token_hex(8), secrets.randbelow(1 << 32) + 1, *arguments)
        return await self._connection.write(script, (keys.ACCESS_KEYS, keys.KEY_CHANGES), *given)


def _decoded(fields: dict[str, bytes | None]) -> KeyRing:
    """Decode fields of the hash; a bank or a quota that is None was removed."""
    ring, revision = (fields.pop(_RING, None) or b"").decode(), int(fields.pop(_REVISION, None) or 0)
    revoked = {digest: int(when_ms) for digest, when_ms in _pop(fields, _REVOKED).items() if when_ms}
    banks = {tenant: (bank or b"").decode() for tenant, bank in _pop(fields, _BANK).items()}
    quotas = {tenant: decode(Quota, raw or b"{}") for tenant, raw in _pop(fields, _QUOTA).items()}
    known = [_key(digest, raw or b"", revoked.get(digest)) for digest, raw in fields.items()]
    return KeyRing(revision, sorted(known, key=lambda key: (key.created_ms, key.digest)), banks, ring, quotas)


def _pop(fields: dict[str, bytes | None], prefix: str) -> dict[str, bytes | None]:
    """Remove the fields with a prefix; return them without it."""
    return {name.removeprefix(prefix): fields.pop(name) for name in list(fields) if name.startswith(prefix)}


def _key(digest: str, raw: bytes, revoked_ms: int | None) -> AccessKey:
    return replace(decode(AccessKey, raw), digest=digest, revoked_ms=revoked_ms, policy=decode(Policy, raw))
