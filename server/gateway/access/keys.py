"""Who sends a request, by API keys that are read at the start and every few seconds, never while a request waits."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any

from adapters.errors import MtaError, excerpt
from server.errors import ApiError, Forbidden, Unauthorized
from server.store.tenants.access_keys import CREATE, AccessKeys, Scope, digest_of
from server.store.tenants.rates import NO_OVERRIDES, Allowance

log = logging.getLogger("mta.gateway")

LOOK_AGAIN_S = 2.0
"""How often a gateway looks for changes. With a store that answers in time, they count in under 5 s."""

_MAX_SECRET_BYTES = 128
_EVERYTHING = frozenset(Scope)

Headers = Iterable[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request."""

    tenant: str
    key_id: str  # the key's public name; empty while no key exists
    scopes: frozenset[Scope]
    allowance: Allowance = NO_OVERRIDES

    @property
    def name(self) -> str:
        """Names whoever takes turns and has limits: a key, or a tenant while no key exists."""
        return f"key-{self.key_id}" if self.key_id else f"tenant-{self.tenant}"


def caller_of(request: Mapping[str, Any]) -> Caller:
    """Who sent a request, given as Starlette's `Request` or as an ASGI scope; raises what `KnownKeys.caller` found.

    Only open routes get so far without a key that counts.
    """
    found: Caller | ApiError = request["state"]["caller"]
    if isinstance(found, ApiError):
        raise found
    return found


def name_of(request: Mapping[str, Any]) -> str:
    """The sender's name where turns are taken; all who sent no key that counts share one."""
    found = request["state"]["caller"]
    return found.name if isinstance(found, Caller) else ""


def is_admin(request: Mapping[str, Any]) -> bool:
    """Whether the sender may know how the server is doing."""
    found = request["state"]["caller"]
    return isinstance(found, Caller) and Scope.ADMIN in found.scopes


class KnownKeys:
    """Says who sent a request.

    Until the first key is made, everybody on this machine may do everything, as the `tenant` of the settings. From then
    on neither an error nor a store that has lost its keys opens anything.
    """

    def __init__(self, tenant: str) -> None:
        self._anybody = Caller(tenant, "", _EVERYTHING)
        self._callers: dict[str, Caller] = {}
        self._revoked: frozenset[str] = frozenset()
        self._banks: Mapping[str, str] = {}
        self._ring = ""
        self._revision = 0

    @property
    def any_exists(self) -> bool:
        return self._revision > 0

    async def look(self, store: AccessKeys) -> None:
        """Take over what has changed in the store."""
        found, revision = await store.revision()
        if revision < self._revision or (self._ring and found != self._ring):
            log.error(
                "the store has lost API keys (revision %d of ring %s after %d of %s): those known here still count; "
                "restart the gateways once it is meant to be so",
                revision,
                found or "none",
                self._revision,
                self._ring or "none",
            )
            return
        if revision == self._revision:
            return
        ring = await store.all()
        self._callers = {
            key.digest: Caller(key.tenant, key.id, key.scopes, key.allowance)
            for key in ring.keys
            if key.revoked_ms is None
        }
        self._revoked = frozenset(key.digest for key in ring.keys if key.revoked_ms is not None)
        self._banks = ring.banks
        self._ring, self._revision = ring.id, ring.revision
        log.info("%d API keys count", len(self._callers))

    def bank_of(self, tenant: str) -> str | None:
        """The 8 hex digits of the bank that a tenant names."""
        return self._banks.get(tenant)

    def check_host(self, host: str) -> None:
        """Raise `MtaError` where other machines reach the gateway while there is no key."""
        if not self.any_exists and not _is_loopback(host):
            raise MtaError(
                f"MTA_HOST is {host}, but no API key exists, so everybody who reaches it could do everything. Make one "
                f"with `{CREATE} NAME`, or listen on 127.0.0.1"
            )

    def caller(self, headers: Headers) -> Caller | ApiError:
        """Who sent a request with these headers, or why nobody did.

        Raises `Forbidden` when there is no key and the request names another host: a page in a browser on this machine
        can be made to send such requests.
        """
        if not self.any_exists:
            _check_is_local(headers)
            return self._anybody
        given = [value for name, value in headers if name == b"authorization"]
        if not given:
            return Unauthorized("an API key is required: send `Authorization: Bearer KEY`", code="missing_api_key")
        scheme, _, secret = given[0].partition(b" ")
        secret = secret.strip()
        if len(given) > 1 or scheme.lower() != b"bearer" or not 0 < len(secret) <= _MAX_SECRET_BYTES:
            return Unauthorized("the Authorization header must be one, and `Bearer KEY`")
        digest = digest_of(secret)
        if (caller := self._callers.get(digest)) is not None:
            return caller
        if digest in self._revoked:
            return Unauthorized(f"this API key was revoked: `{CREATE} NAME` makes another", code="revoked_api_key")
        return Unauthorized(
            f"this API key is not known: `mta keys list` shows those that are, `{CREATE} NAME` makes one"
        )


def _check_is_local(headers: Headers) -> None:
    hosts = [value for name, value in headers if name == b"host"]
    host = hosts[0].decode("latin-1") if len(hosts) == 1 else ""
    name, colon, port = host.rpartition(":")
    if not _is_loopback((name if colon and port.isdecimal() else host).strip("[]")):
        raise Forbidden(
            f"no API key exists, so only requests to this machine's own address are answered, not to {excerpt(host)}: "
            f"make a key with `{CREATE} NAME`, or ask http://127.0.0.1",
            code="no_api_key_exists",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
