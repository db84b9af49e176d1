"""User ids: which are accepted, and the keyed hash that stands for one outside its own profile record.

The hash covers the tenant: the same id is another user in each.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import unicodedata
from dataclasses import dataclass

from adapters.errors import MtaError

MAX_USER_ID_BYTES = 256
MIN_SECRET_BYTES = 16
_FORBIDDEN = frozenset("/\\{}")
_UNDECODABLE = "\ufffd"  # what a percent-encoded byte that is not UTF-8 has become by the time the path is read


def check_user_id(user_id: str) -> str:
    """Return `user_id` if it is valid.

    Raises:
        ValueError: saying which rule it breaks; the caller adds the value.
    """
    # Characters first: a megabyte is refused without being encoded.
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
    """A user of one tenant.

    Attributes:
        id: as the app gives it, already checked.
        key: what stands for the id outside the user's own profile record: 26 characters of base32 (128 bits), the
            alphabet of recipe names.
        former: keys under which version 0.1, which took each Unicode normal form for a separate user, may have stored
            them; needed for erasing. Empty for an id that has only one form, such as ASCII.
    """

    id: str
    key: str
    former: tuple[str, ...] = ()

    def is_stored_under(self, key: str) -> bool:
        """Whether a key stands, or once stood, for this user."""
        return key == self.key or key in self.former


class UserKeys:
    """The keyed hashes of one tenant's users.

    Args:
        secret: the same for all gateways, never changed: without it no user can be found again.
        tenant: whose users these are.

    Raises:
        MtaError: when the secret is missing or short, or the tenant could be mistaken for another.
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
        self.cache_salt = self._digest(f"\0cache salt\0{tenant}")  # no tenant is empty: never a user's key
        """What vLLM salts this tenant's prefix cache with: cached timing then says nothing to other tenants."""

    def user(self, user_id: str) -> User:
        """The tenant's user with this id."""
        return User(user_id, self.key(user_id), () if user_id.isascii() else self._former(user_id))

    def key(self, user_id: str) -> str:
        """The user's key.

        It is made from the id in Unicode normal form C: `é` is one letter, whether an app sends it as one character or
        two.
        """
        return self._digest(f"{self._tenant}\0{unicodedata.normalize('NFC', user_id)}")

    def _former(self, user_id: str) -> tuple[str, ...]:
        forms = {user_id, unicodedata.normalize("NFD", user_id)} - {unicodedata.normalize("NFC", user_id)}
        return tuple(self._digest(f"{self._tenant}\0{form}") for form in sorted(forms))

    def _digest(self, text: str) -> str:
        digest = hmac.digest(self._secret, text.encode(), hashlib.sha256)
        return base64.b32encode(digest[:16]).decode().rstrip("=").lower()


class Tenants:
    """The user keys of each tenant, made when they are first needed.

    Args:
        secret: as of `UserKeys`.
        tenant: one that is sure to be needed, so that a secret that does not do is noticed at once.

    Raises:
        MtaError: as `UserKeys`.
    """

    def __init__(self, secret: str | None, tenant: str) -> None:
        self._secret = secret
        self._known = {tenant: UserKeys(secret, tenant)}

    def users(self, tenant: str) -> UserKeys:
        """The keys of a tenant's users."""
        if (users := self._known.get(tenant)) is None:
            users = self._known[tenant] = UserKeys(self._secret, tenant)
        return users
