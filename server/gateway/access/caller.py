"""Who sent a request, as the rest of the gateway sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from server.errors import ApiError
from server.store.tenants.access_keys import Scope
from server.store.tenants.rates import AS_USUAL, Allowance


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request.

    Attributes:
        tenant: whose users the request may name.
        key_id: the key's public name, not its secret; empty while no key exists.
        scopes: what it may do.
        allowance: how much of it, as far as the key says so.
    """

    tenant: str
    key_id: str
    scopes: frozenset[Scope]
    allowance: Allowance = AS_USUAL

    @property
    def name(self) -> str:
        """Stands for whoever takes turns and has limits: a key, or all of a tenant that need none."""
        return f"key-{self.key_id}" if self.key_id else f"tenant-{self.tenant}"


def caller_of(request: Mapping[str, Any]) -> Caller:
    """Who sent a request, given as Starlette's `Request` or as an ASGI scope.

    Raises:
        Unauthorized: when it carries no key, or one that does not count. Only open routes get so far.
    """
    found: Caller | ApiError = request["state"]["caller"]
    if isinstance(found, ApiError):
        raise found
    return found


def name_of(request: Mapping[str, Any]) -> str:
    """Stands for who sent a request where turns are taken; all who sent no key that counts are one."""
    found = request["state"]["caller"]
    return found.name if isinstance(found, Caller) else ""


def is_admin(request: Mapping[str, Any]) -> bool:
    """Whether the sender may know how the server is doing."""
    found = request["state"]["caller"]
    return isinstance(found, Caller) and Scope.ADMIN in found.scopes
