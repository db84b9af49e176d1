"""What all stores have in common: a connection, and records that may be unreadable. Does not import redis-py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from pydantic import TypeAdapter

from server.errors import Unavailable

if TYPE_CHECKING:
    from server.store.redis.servers.connection import RedisConnection

T = TypeVar("T")


class Store:
    """Stores one kind of data. Methods raise `Unavailable` if the server cannot be reached or refuses."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection


_type_adapter = cache(TypeAdapter)  # building one takes milliseconds


def decode(kind: type[T], raw: bytes | str) -> T:
    """Decode JSON as a dataclass; ignore fields that only a later version knows. Raises `ValueError` if invalid."""
    decoded: T = _type_adapter(kind).validate_json(raw)  # type: ignore[arg-type]  # to mypy, types have no hash
    return decoded


def pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    """Return the hash that a script returned as field, value, field, value …"""
    return dict(zip(flat[::2], flat[1::2], strict=True))


@contextmanager
def corrupt_if_undecodable() -> Iterator[None]:
    """Turn decoding errors into `Unavailable` (`store_corrupt`): bad data, or a record of a newer version."""
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:
        raise Unavailable("the store holds a record that this version cannot read", code="store_corrupt") from error
