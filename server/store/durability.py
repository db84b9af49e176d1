"""What all stores have in common: durability, memory use, and unreadable records. Does not import redis-py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Protocol, TypeVar

from pydantic import TypeAdapter

from server.errors import Unavailable

if TYPE_CHECKING:
    from server.store.redis.servers.connection import RedisConnection

T = TypeVar("T")

FULL_SHARE = 0.99  # memory use from which a store counts as full: the next write may need more than is free


class Durability(StrEnum):
    """How a write is confirmed to be on disk before it is acknowledged."""

    ALWAYS = "appendfsync always"
    WAITAOF = "WAITAOF after each write"
    NONE = "none"
    EVICTS = "none: keys are evicted"

    @property
    def is_durable(self) -> bool:
        return self not in (Durability.NONE, Durability.EVICTS)


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory use of a store; with several servers, of the fullest one."""

    used_bytes: int
    max_bytes: int  # limit above which the server refuses writes; 0 if no limit is configured

    @property
    def share(self) -> float:
        return self.used_bytes / self.max_bytes if self.max_bytes else 0.0

    @property
    def full(self) -> bool:
        return self.share >= FULL_SHARE


class CheckedStore(Protocol):
    """A store, with the results of its last `check`."""

    durability: Durability
    memory: Memory | None  # None if the store does not report it

    @property
    def unserved(self) -> str | None:
        """Message about users who cannot be served while most can; None if all can."""

    async def check(self) -> Durability:
        """Connect to the store and determine how its writes become durable.

        Raises `Unavailable` if the store cannot be reached, or is not durable although the settings require it.
        """


class Store:
    """Stores one kind of data. Methods raise `Unavailable` if the server cannot be reached or refuses."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection


_type_adapter = cache(TypeAdapter)  # building one takes milliseconds


def decode(kind: type[T], raw: bytes | str) -> T:
    """Decode JSON as a dataclass; ignore fields that only a later version knows. Raises `ValueError` if invalid."""
    decoded: T = _type_adapter(kind).validate_json(raw)  # type: ignore[arg-type]  # to mypy, types have no hash
    return decoded


@contextmanager
def corrupt_if_undecodable() -> Iterator[None]:
    """Turn decoding errors into `Unavailable` (`store_corrupt`): bad data, or a record of a newer version."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable("the store holds a record that this version cannot read", code="store_corrupt") from error
