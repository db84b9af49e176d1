"""The store's port for API keys. A key is a secret that its owner alone has; what is kept recognises it."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from adapters.errors import MtaError, excerpt
from server.store.tenants.rates import AS_USUAL, Allowance

PREFIX = "mta_"
SECRET_BYTES = 32
FEWEST_KINDS = 10
"""Random characters are of more kinds: of 64 hexadecimal ones, all but one in a billion."""
MAX_NAME_CHARS = 64
CREATE = "mta keys create"
"""The command that makes a key; errors name it."""


class Scope(StrEnum):
    """What a key allows."""

    GENERATE = "generate"
    WRITE = "write"
    ADAPT = "adapt"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class AccessKey:
    """What is kept of an API key.

    Attributes:
        digest: SHA-256 of the secret, 64 hex digits.
        last: the secret's last four characters, to recognise it by.
        created_ms, revoked_ms: Unix time in milliseconds; a revoked key counts no more.
    """

    digest: str
    name: str
    tenant: str
    scopes: frozenset[Scope]
    last: str
    created_ms: int
    revoked_ms: int | None = None
    allowance: Allowance = AS_USUAL

    @property
    def id(self) -> str:
        """The key's public name: of 256 random bits, hashed, it gives 48."""
        return self.digest[:12]


@dataclass(frozen=True, slots=True)
class KeyRing:
    """All keys as they were at one moment.

    Attributes:
        revision: grows with every change; 0 while no key has ever been made.
        keys: oldest first, revoked ones included.
        banks: of tenants that name one, its 8 hex digits.
        id: random, given with its first change; empty before.
    """

    revision: int
    keys: Sequence[AccessKey]
    banks: Mapping[str, str] = field(default_factory=dict)
    id: str = ""


class AccessKeys(Protocol):
    """Keeps API keys. Every method raises `Unavailable` when the store cannot be reached or refuses.

    A key is never forgotten, only revoked: a store in which one was made never looks like one in which none was.
    """

    async def revision(self) -> tuple[str, int]:
        """What `KeyRing.id` and `KeyRing.revision` would be."""

    async def all(self) -> KeyRing:
        """All of them."""

    async def add(self, key: AccessKey, *, only_first: bool = False) -> bool:
        """Keep a key, on disk when it returns: with `only_first` only if there is none yet, not even a revoked one.
        Returns whether it is kept."""

    async def name_bank(self, tenant: str, bank: str) -> None:
        """Have a tenant that has keys be served by a bank (8 hex digits; empty for the gateways' own); on disk when it
        returns."""

    async def revoke(self, digest: str, now_ms: int) -> bool:
        """Have a key count no more, on disk when it returns; returns whether it counted until now."""


def new_secret() -> str:
    """A secret of 256 bits, with a beginning by which scanners find those that leaked."""
    return PREFIX + secrets.token_urlsafe(SECRET_BYTES)


def given_secret(text: str) -> str:
    """A secret of somebody else's making, of at least as many characters as ours.

    Raises:
        MtaError: when it has another form, or cannot be random; it does not repeat it.
    """
    if re.fullmatch(PREFIX + r"[A-Za-z0-9_-]{43,100}", text) and len(set(text.removeprefix(PREFIX))) >= FEWEST_KINDS:
        return text
    raise MtaError(
        f"MTA_FIRST_KEY must be `{PREFIX}` and 43 to 100 random letters, digits, `-` or `_`, and is not (it has "
        f'{len(text)} characters of {len(set(text))} kinds): `echo "{PREFIX}$(openssl rand -hex 32)"` makes one'
    )


def access_key(
    secret: str, name: str, tenant: str, scopes: Iterable[Scope], allowance: Allowance = AS_USUAL
) -> AccessKey:
    """What is kept of a secret that was made just now.

    Raises:
        MtaError: when the name or the tenant is none, or no scope is given.
    """
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
