"""Imports the profiles of a file's people into a gateway, a few at a time, from where the last run stopped.

The file is LaMP's per-user layout or newline-delimited JSON. The gateway checks the items: the bank's task says what
they hold.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import IO, Any

import orjson

from adapters.errors import MtaError, excerpt
from server.cli.users.patience import PatientGateway, Refused
from server.store.tenants.user_key import check_user_id

_OUT = Path("out")
_LOOK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PersonEntry:
    """A person in a file: `place` is the line or entry, from 1; `fault` says why they cannot be read."""

    place: int
    user_id: str
    items: list[Any]
    fault: str = ""

    def digest(self, url: str) -> bytes:
        """A hash of this person with these items at a gateway: it shows nobody who they are."""
        content = orjson.dumps([url, self.user_id, self.items], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(content).digest()[:16]


@dataclass(slots=True)
class ImportCounts:
    """How many people this run has imported, an earlier run had, and cannot be."""

    imported: int = 0
    before: int = 0
    failed: int = 0

    @property
    def seen(self) -> int:
        return self.imported + self.before + self.failed


class Journal:
    """What is done, a hash a line, which the next run reads, and what failed in this run, with reasons.

    Both are beside the file of `people`, or under `out/` where nothing can be written beside it. MtaError when they
    cannot be written.
    """

    def __init__(self, people: Path, state: Path | None = None) -> None:
        folder = people.parent if os.access(people.parent, os.W_OK) else _OUT
        done = state or folder / f"{people.name}.imported"
        self.failed = failed = done.with_name(f"{people.name}.failed.ndjson")
        self._known: set[bytes] = set()
        self._files = ExitStack()
        self._failures: IO[bytes] | None = None
        try:
            done.parent.mkdir(parents=True, exist_ok=True)
            failed.unlink(missing_ok=True)
            self._done = self._files.enter_context(_private(done))
            lines, _, torn = self._done.read().rpartition(b"\n")
            self._known.update(bytes.fromhex(line.decode()) for line in lines.splitlines())
            self._done.truncate(self._done.tell() - len(torn))  # the last run was killed while it wrote this
        except (OSError, ValueError) as error:
            self._files.close()
            raise MtaError(f"{done} is not the state of an import, or cannot be written: {error}") from error

    def close(self) -> None:
        self._files.close()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._known

    def add(self, digest: bytes) -> None:
        """Note that a person is imported."""
        self._known.add(digest)
        self._done.write(digest.hex().encode() + b"\n")
        self._done.flush()

    def fail(self, person: PersonEntry, reason: str) -> None:
        """Note why a person cannot be imported."""
        if self._failures is None:
            self._failures = self._files.enter_context(_private(self.failed))
        self._failures.write(orjson.dumps({"entry": person.place, "user_id": person.user_id, "reason": reason}) + b"\n")
        self._failures.flush()


@dataclass
class Import:
    """One run; `on_count` is called after every person."""

    gateway: PatientGateway
    journal: Journal
    on_count: Callable[[ImportCounts], None] = lambda counts: None
    counts: ImportCounts = field(default_factory=ImportCounts)
    _noting: Lock = field(default_factory=Lock)

    def run(self, path: Path, at_a_time: int) -> ImportCounts:
        """Import the people of a file, with so many requests in flight at most.

        Raises MtaError when the file cannot be read, or the gateway is away for too long; what is done is noted.
        """
        sent: set[Future[None]] = set()
        with ThreadPoolExecutor(at_a_time) as threads:
            try:
                for person in read_people(path):
                    if person.fault:
                        self._note(person, person.fault)
                    elif person.digest(self.gateway.url) in self.journal:
                        with self._noting:
                            self.counts.before += 1
                            self.on_count(self.counts)
                    else:
                        sent.add(threads.submit(self._send, person))
                        if len(sent) == at_a_time:
                            answered, sent = wait(sent, return_when=FIRST_COMPLETED)
                            for one in answered:
                                one.result()
                for one in sent:
                    one.result()
            finally:
                self.gateway.stop()
        return self.counts

    def _send(self, person: PersonEntry) -> None:
        try:
            self.gateway.call(lambda client: client.put_profile(person.user_id, person.items))
        except Refused as error:
            self._note(person, str(error))
        else:
            self._note(person)

    def _note(self, person: PersonEntry, failed: str = "") -> None:
        with self._noting:
            if failed:
                self.journal.fail(person, failed)
                self.counts.failed += 1
            else:
                self.journal.add(person.digest(self.gateway.url))
                self.counts.imported += 1
            self.on_count(self.counts)


def count_people(path: Path) -> int:
    """How many people a file holds; raises MtaError when it cannot be read."""
    return sum(1 for _ in _entries(path))


def read_people(path: Path) -> Iterator[PersonEntry]:
    """The people in a file, in its order; raises MtaError when it cannot be read."""
    seen: set[str] = set()
    for place, raw in _entries(path):
        person = _person(place, raw)
        if person.user_id in seen:
            fault = f"{excerpt(person.user_id)} stands in the file twice: join the entries"
            person = PersonEntry(place, person.user_id, [], fault)
        elif person.user_id:
            seen.add(person.user_id)
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


def _private(path: Path) -> IO[bytes]:
    """A file to read and append to that only its owner reads: it is about people."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+b")
