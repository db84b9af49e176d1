"""Identifies callers by API keys, which are loaded at startup and refreshed every few seconds."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from adapters.errors import MtaError, excerpt
from server.clock import this_hour
from server.errors import Forbidden, Unauthorized
from server.store.tenants.access_keys import CREATE, USUAL, AccessKeys, Policy, Scope, digest_of
from server.store.tenants.rates import Quota

log = logging.getLogger("mta.gateway")

REFRESH_INTERVAL_S = 2.0  # a change of the keys takes effect in under 5 s unless the store is slow
USED_INTERVAL_S = 60.0  # seconds until the store knows that a key was used

_MAX_SECRET_BYTES = 128
_KEYS_LOST = (
    "the store has lost API keys (ring %s instead of %s): this gateway still accepts the keys that it has loaded; "
    "if the change is intended, restart the gateways"
)
_OF_PROXIES = frozenset((b"forwarded", b"x-real-ip", b"via"))

Headers = Iterable[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Caller:
    tenant: str
    key_id: str  # public id of the key; empty while no key exists
    scopes: frozenset[Scope]
    policy: Policy = USUAL
    expires_ms: int | None = None  # time from which the key is refused, Unix time

    @property
    def name(self) -> str:
        """The owner of places (`shares.py`)."""
        return f"{self.tenant}\0{self.key_id}"

    @property
    def owner(self) -> str:
        """The owner of limits: the key, or the tenant while no key exists."""
        return f"key-{self.key_id}" if self.key_id else f"tenant-{self.tenant}"


def caller_of(request: Mapping[str, Any]) -> Caller:
    """Return the caller of a request or ASGI scope; `Unauthorized` if it has no valid key, which open routes allow."""
    caller: Caller | Unauthorized = request["state"]["caller"]
    if isinstance(caller, Unauthorized):
        raise caller
    return caller


def caller_name_of(request: Mapping[str, Any]) -> str:
    """Return the name under which the caller competes for places; all requests without a valid key share one name."""
    caller = request["state"]["caller"]
    return caller.name if isinstance(caller, Caller) else ""


def is_admin(request: Mapping[str, Any]) -> bool:
    """Return whether the caller may see the state of the server."""
    caller = request["state"]["caller"]
    return isinstance(caller, Caller) and Scope.ADMIN in caller.scopes


class KnownKeys:
    """Identifies callers by their keys.

    Until the first key is created, every local client has full access as the `tenant` of the settings. After that,
    neither an error nor a store that has lost its keys grants access.
    """

    def __init__(self, tenant: str) -> None:
        self._local_caller = Caller(tenant, "", frozenset(Scope))
        self._callers: dict[str, Caller] = {}
        self._revoked = set[str]()  # digests
        self._banks: dict[str, str] = {}
        self.quotas: dict[str, Quota] = {}  # by tenant
        self._ring = ""
        self._revision = 0  # until the first key is created
        self.are_lost = False  # whether the store has lost them
        self._seen = set[str]()  # digests of keys used since the last `note_used`
        self._noted = dict[str, int]()  # hour of the last use that the store knows from here, by digest

    async def refresh(self, store: AccessKeys) -> None:
        """Load from the store what has changed since the last call: all keys at first, and after a failover."""
        ring_id, revision = await store.revision()
        self.are_lost = bool(self._ring) and ring_id != self._ring
        if self.are_lost:
            log.error(_KEYS_LOST, ring_id or "none", self._ring)
            return
        if revision == self._revision:
            return
        changed = await store.changes(self._revision, revision)
        ring = changed or await store.all()
        if ring.id != ring_id:  # the store was exchanged meanwhile, which the next call finds
            return
        if changed is None:
            self._callers, self._banks, self.quotas = {}, {}, {}
        # A failover may also lose a revocation: what was revoked once stays so.
        self._revoked |= {key.digest for key in ring.keys if key.revoked_ms is not None}
        self._callers |= {
            key.digest: Caller(key.tenant, key.id, key.scopes, key.policy, key.expires_ms) for key in ring.keys
        }
        for digest in self._revoked & self._callers.keys():
            del self._callers[digest]
        self._banks = {tenant: bank for tenant, bank in {**self._banks, **ring.banks}.items() if bank}
        self.quotas = {tenant: quota for tenant, quota in {**self.quotas, **ring.quotas}.items() if quota.limits}
        self._ring, self._revision = ring.id, ring.revision
        log.info("loaded %d API keys, %d are valid", len(ring.keys), len(self._callers))

    async def note_used(self, store: AccessKeys) -> None:
        """Tell the store which keys were used, once an hour for each."""
        seen, self._seen = self._seen, set()
        hour = this_hour()
        if new := {digest for digest in seen if self._noted.get(digest) != hour}:
            await store.note_used(new, hour)
            self._noted |= dict.fromkeys(new, hour)

    def bank_of(self, tenant: str) -> str | None:
        """Return the first 8 hex digits of the bank assigned to a tenant, or None for the default bank."""
        return self._banks.get(tenant)

    def holds_out(self, tenant: str, default: float) -> bool:
        """Return whether a key of the tenant holds users out; `default` is the share by the settings."""
        fractions = {caller.policy.holdout for caller in self._callers.values() if caller.tenant == tenant}
        return any(default if share is None else share for share in fractions or {None})

    def check_host(self, host: str) -> None:
        """Raise `MtaError` if no key exists and `host` is not a loopback address."""
        if not self._revision and not _is_loopback(host):
            raise MtaError(
                f"MTA_HOST is {host}, but no API key exists, so anyone who can reach it would have full access. Create "
                f"a key with `{CREATE} NAME`, or listen on 127.0.0.1"
            )

    def caller(self, headers: Headers, key_header: bytes = b"") -> Caller | Unauthorized:
        """Return the caller for these headers; if they carry no valid key, return the error, as open routes ignore it.

        `key_header` is another header that may hold the key alone; it is not read beside `Authorization`.
        Raise `Forbidden`, on every route, if no key exists and the `Host` header is not local, for DNS rebinding can
        make a local browser send such requests, or if a proxy forwards the request, whose client may be anywhere.
        """
        if not self._revision:
            _check_is_local(headers)
            return self._local_caller
        given = [value for name, value in headers if name == b"authorization"]
        given = given or [b"Bearer " + value for name, value in headers if name == key_header]
        if not given:
            return Unauthorized("an API key is required: send `Authorization: Bearer KEY`", code="missing_api_key")
        scheme, _, secret = given[0].partition(b" ")
        secret = secret.strip()
        if len(given) > 1 or scheme.lower() != b"bearer" or not 0 < len(secret) <= _MAX_SECRET_BYTES:
            return Unauthorized("send exactly one Authorization header, in the form `Bearer KEY`")
        return self._caller(digest_of(secret))

    def _caller(self, digest: str) -> Caller | Unauthorized:
        caller = self._callers.get(digest)
        if caller is not None and (caller.expires_ms is None or time.time() * 1000 < caller.expires_ms):
            self._seen.add(digest)
            return caller
        new = f"create another with `{CREATE} NAME`"
        if caller is not None:
            return Unauthorized(f"this API key has expired: {new}", code="expired_api_key")
        if digest in self._revoked:
            return Unauthorized(f"this API key was revoked: {new}", code="revoked_api_key")
        return Unauthorized(f"this API key does not exist: `mta keys list` lists all keys, `{CREATE} NAME` creates one")


def _check_is_local(headers: Headers) -> None:
    hosts = [value for name, value in headers if name == b"host"]
    host = hosts[0].decode("latin-1") if len(hosts) == 1 else ""
    name, colon, port = host.rpartition(":")
    by_proxy = any(name in _OF_PROXIES or name.startswith(b"x-forwarded-") for name, _ in headers)
    if by_proxy or not _is_loopback((name if colon and port.isdecimal() else host).strip("[]")):
        raise Forbidden(
            "no API key exists, so the gateway only accepts requests to a loopback address that no proxy forwards, got "
            f"host {excerpt(host)}: create a key with `{CREATE} NAME`, or use http://127.0.0.1",
            code="no_api_key_exists",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
