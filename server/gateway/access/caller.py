"""Who sent a request, as the rest of the gateway sees it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Scope(StrEnum):
    """What a key allows."""

    GENERATE = "generate"
    WRITE = "write"
    ADAPT = "adapt"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request.

    Attributes:
        tenant: whose users the request may name.
        key_id: the key's public name, not its secret; empty while no key exists.
        scopes: what it may do.
    """

    tenant: str
    key_id: str
    scopes: frozenset[Scope]
