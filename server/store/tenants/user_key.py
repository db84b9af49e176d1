"""User ids: validation, and the keyed hash that replaces an id everywhere outside its profile record."""

from __future__ import annotations

import base64
import hashlib
import hmac
import unicodedata
from dataclasses import dataclass
from functools import cache

from adapters.errors import MtaError

MAX_USER_ID_BYTES = 256
MIN_SECRET_BYTES = 16
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


class UserKeys:
    """Computes the user keys of one tenant; the same id is a different user in each tenant.

    The secret must never change: without it users cannot be found again. Raises `MtaError` if secret or tenant is
    invalid.
    """

    def __init__(self, secret: str | None, tenant: str) -> None:
        if secret is None or len(secret.encode()) < MIN_SECRET_BYTES:
            given = "not set" if secret is None else f"shorter than {MIN_SECRET_BYTES} bytes"
            raise MtaError(
                f"MTA_SECRET is {given}: it keys the hash of user ids. Set it to the same long random text for all "
                "gateways, e.g. from `openssl rand -hex 32`, and keep it"
            )
        if "\0" in tenant or not tenant:
            raise MtaError(f"a tenant (MTA_TENANT) must have a name without NUL, got {tenant!r}")
        self._secret = secret.encode()
        self._tenant = tenant
        # Salt for this tenant's prefix cache in vLLM: cache timing then reveals nothing to other tenants.
        self.cache_salt = self._digest(f"\0cache salt\0{tenant}")  # no user's key: no tenant is empty
        self.check_value = self._digest("\0check")  # recognises the secret
        self._answer_key = hmac.digest(self._secret, f"\0answers\0{tenant}".encode(), hashlib.sha256)

    def user(self, user_id: str) -> User:
        return User(user_id, self.key(user_id), self._tenant)

    def key(self, user_id: str) -> str:
        """Return a user's key. Ids are normalised to Unicode NFC: `é` may be sent as one character or two."""
        return self._digest(f"{self._tenant}\0{unicodedata.normalize('NFC', user_id)}")

    def sign_answer(self, signed: bytes) -> bytes:
        """Return a MAC of 16 bytes for what the id of an answer says, valid within this tenant."""
        return hmac.digest(self._answer_key, signed, hashlib.sha256)[:16]

    def _digest(self, text: str) -> str:
        digest = hmac.digest(self._secret, text.encode(), hashlib.sha256)
        return base64.b32encode(digest[:16]).decode().rstrip("=").lower()


class Tenants:
    """The `UserKeys` of each tenant. Those of `tenant` are created at once, so that a bad secret is noticed."""

    def __init__(self, secret: str | None, tenant: str) -> None:
        self.users = cache(lambda tenant: UserKeys(secret, tenant))
        self.users(tenant)
