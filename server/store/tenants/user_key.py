"""User ids: validation, and the keyed hash that replaces an id everywhere outside its profile record."""

from __future__ import annotations

import base64
import hashlib
import hmac
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from adapters.errors import MtaError

MAX_USER_ID_BYTES = 256
MIN_SECRET_BYTES = 16
MAX_SECRETS = 2
_FORBIDDEN = frozenset("/\\{}")
_UNDECODABLE = "\ufffd"  # replaces percent-encoded bytes that are not UTF-8 when the path is decoded


def check_user_id(user_id: str) -> str:
    """Return the id if it is valid, else raise `ValueError` naming the broken rule (without the id)."""
    # Check the characters first, so that a very long id is refused without being encoded.
    if not 0 < len(user_id) <= MAX_USER_ID_BYTES or len(user_id.encode("utf-8", "replace")) > MAX_USER_ID_BYTES:
        raise ValueError(f"must be 1 to {MAX_USER_ID_BYTES} bytes of UTF-8")
    if not user_id.isprintable() or " " in user_id or _UNDECODABLE in user_id:
        raise ValueError("must be printable UTF-8 without spaces or control characters")
    if not _FORBIDDEN.isdisjoint(user_id):
        raise ValueError("must not contain / \\ { or }")
    if user_id in (".", ".."):
        raise ValueError("must not be . or ..")
    return user_id


@dataclass(frozen=True, slots=True)
class User:
    """A user of one tenant."""

    id: str  # as sent by the app, validated
    key: str  # keyed hash of the id: 26 base32 characters (128 bits), the alphabet of recipe names
    tenant: str
    keys: tuple[str, ...] = ()  # by each secret, while there are two: the user is stored under one of them

    @property
    def every_key(self) -> tuple[str, ...]:
        return self.keys or (self.key,)


class UserKeys:
    """Computes the user keys of one tenant; the same id is a different user in each tenant.

    `secret` is MTA_SECRET. Without a user's secret the user cannot be found again, so a secret is only ever exchanged
    (`server/store/rotation.py`). Raises `MtaError` if secret or tenant is invalid.
    """

    def __init__(self, secret: str | None, tenant: str) -> None:
        self._secrets = secrets_of(secret)
        if "\0" in tenant or not tenant:
            raise MtaError(f"a tenant (MTA_TENANT) must have a name without NUL, got {tenant!r}")
        self.tenant = tenant
        # Salt for this tenant's prefix cache in vLLM: cache timing then reveals nothing to other tenants.
        self.cache_salt = _digest(self._secrets[0], f"\0cache salt\0{tenant}")  # no user's key: no tenant is empty
        answers = f"\0answers\0{tenant}".encode()
        self._answer_keys = [hmac.digest(secret, answers, hashlib.sha256) for secret in self._secrets]

    def user(self, user_id: str) -> User:
        keys = self.keys(user_id)
        return User(user_id, keys[0], self.tenant, keys if len(keys) > 1 else ())

    def key(self, user_id: str) -> str:  # by the first secret
        return self.keys(user_id)[0]

    def keys(self, user_id: str) -> tuple[str, ...]:
        """Return a user's key by each secret. `é` may be sent as one character or two: ids are in Unicode NFC."""
        text = f"{self.tenant}\0{unicodedata.normalize('NFC', user_id)}"
        return tuple(_digest(secret, text) for secret in self._secrets)

    def sign_answer(self, user: User, head: bytes, rest: bytes) -> list[bytes]:
        """Return MACs of 16 bytes for what the id of an answer says, valid within this tenant, by each secret."""
        signed = [b"\0".join((head, key.encode(), rest)) for key in user.every_key]
        return [hmac.digest(*pair, hashlib.sha256)[:16] for pair in zip(self._answer_keys, signed, strict=True)]


class Tenants:
    """The `UserKeys` of each tenant. Those of `tenant` are created at once, so that a bad secret is noticed."""

    def __init__(self, secret: str | None, tenant: str) -> None:
        self.users = cache(lambda tenant: UserKeys(secret, tenant))
        self.users(tenant)


def secrets_of(secret: str | None) -> Sequence[bytes]:
    """Return the secrets in MTA_SECRET: one, or `NEW,OLD`. Raises `MtaError` if one is too short to be a secret."""
    parts = [] if secret is None else [part.encode() for part in secret.split(",")]
    if not parts or min(map(len, parts)) < MIN_SECRET_BYTES:
        given = f"shorter than {MIN_SECRET_BYTES} bytes" if parts else "not set"
        given += " in a part (a comma parts `NEW,OLD`)" if len(parts) > 1 else ""
        raise MtaError(
            f"MTA_SECRET is {given}: it keys the hash of user ids. Set it to the same long random text for all "
            "gateways, e.g. from `openssl rand -hex 32`, and keep it"
        )
    if len(parts) > MAX_SECRETS or len(set(parts)) < len(parts):
        raise MtaError(
            f"MTA_SECRET holds {len(parts)} secrets, {len(set(parts))} of them different: set one, or `NEW,OLD` while "
            "it is exchanged (`mta secret rotate`)"
        )
    return parts


def check_values(secret: str | None) -> list[str]:
    """Return keyed hashes by which the secrets in MTA_SECRET are recognised. Raises `MtaError` as `secrets_of` does."""
    return [_digest(each, "\0check") for each in secrets_of(secret)]


def _digest(secret: bytes, text: str) -> str:
    digest = hmac.digest(secret, text.encode(), hashlib.sha256)
    return base64.b32encode(digest[:16]).decode().rstrip("=").lower()
