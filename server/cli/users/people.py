"""People from a file, one after another: LaMP's per-user layout, or newline-delimited JSON.

The gateway checks items: the bank's task says what they hold. A person who cannot be read is an entry with a fault.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from adapters.errors import MtaError, excerpt
from server.store.tenants.user_key import check_user_id

_LOOK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PersonEntry:
    """A person in a file.

    Attributes:
        place: of the line or the entry, from 1.
        user_id: checked; empty if it cannot be read.
        fault: why this person cannot be read; empty if they can.
    """

    place: int
    user_id: str
    items: list[Any]
    fault: str = ""

    def digest(self, url: str) -> bytes:
        """A hash of this person with these items at a gateway: it shows nobody who they are."""
        content = orjson.dumps([url, self.user_id, self.items], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(content).digest()[:16]


def count_people(path: Path) -> int:
    """How many people a file holds; raises MtaError when it cannot be read."""
    return sum(1 for _ in _entries(path))


def read_people(path: Path) -> Iterator[PersonEntry]:
    """The people in a file, in its order; raises MtaError when it cannot be read."""
    seen: set[bytes] = set()
    for place, raw in _entries(path):
        person = _person(place, raw)
        who = hashlib.sha256(person.user_id.encode()).digest()[:16]
        if person.user_id and who in seen:
            fault = f"{excerpt(person.user_id)} stands in the file twice: join the entries"
            person = PersonEntry(place, person.user_id, [], fault)
        seen.add(who)
        yield person


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """The entries of a file with their places: objects of a list, or lines as they are."""
    try:
        with path.open("rb") as file:
            is_list = file.read(_LOOK_BYTES).lstrip()[:1] == b"["
            file.seek(0)
            if is_list:
                yield from enumerate(orjson.loads(file.read()), 1)
            else:
                yield from ((place, line) for place, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise MtaError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise MtaError(f"{path} is not JSON: {error}") from error


def _person(place: int, raw: Any) -> PersonEntry:
    if isinstance(raw, bytes):
        try:
            raw = orjson.loads(raw)
        except ValueError as error:
            return PersonEntry(place, "", [], f"it is not JSON: {error}")
    if not isinstance(raw, dict):
        return PersonEntry(place, "", [], f"it must be an object, got {excerpt(raw)}")
    named = raw.get("user_id", raw.get("id"))
    if isinstance(named, bool) or not isinstance(named, str | int):
        return PersonEntry(place, "", [], f"it has no user_id (or id), got {excerpt(raw)}")
    try:
        user_id = check_user_id(str(named))
    except ValueError as error:
        return PersonEntry(place, "", [], f"user_id {error}, got {excerpt(named)}")
    items = raw.get("profile", raw.get("items"))
    if not isinstance(items, list) or not items:
        return PersonEntry(place, user_id, [], f"it has no profile: a list of items, got {excerpt(items)}")
    return PersonEntry(place, user_id, [{"text": item} if isinstance(item, str) else item for item in items])
