"""Import people's profiles from a file into a gateway, and continue interrupted imports.

The file is in LaMP's per-user layout or newline-delimited JSON. The gateway checks the items, since their fields depend
on the bank's task.
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
from server.cli.users.retrying import RequestRefused, RetryingGateway
from server.store.tenants.user_key import check_user_id

_FALLBACK_FOLDER = Path("out")
_SNIFF_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PersonEntry:
    """A person in a file: `place` is the line or entry number, from 1; `fault` is the reason if it is invalid."""

    place: int
    user_id: str
    items: list[Any]
    fault: str = ""

    def digest(self, url: str) -> bytes:
        """Return a hash of the gateway, the person and the items, from which nobody can identify the person."""
        content = orjson.dumps([url, self.user_id, self.items], option=orjson.OPT_SORT_KEYS)
        return hashlib.sha256(content).digest()[:16]


@dataclass(slots=True)
class ImportCounts:
    """Number of people imported by this run, skipped because an earlier run imported them, and failed."""

    imported: int = 0
    skipped: int = 0
    failed: int = 0

    @property
    def total(self) -> int:
        return self.imported + self.skipped + self.failed


class Journal:
    """The imported people of all runs, one hash per line, and the failures of this run with reasons.

    Both files are next to the file of `people`, or in `out/` if its folder is read-only. Raises MtaError if they cannot
    be written.
    """

    def __init__(self, people: Path, state: Path | None = None) -> None:
        folder = people.parent if os.access(people.parent, os.W_OK) else _FALLBACK_FOLDER
        done = state or folder / f"{people.name}.imported"
        self.failed = failed = done.with_name(f"{people.name}.failed.ndjson")
        self._known: set[bytes] = set()
        self._files = ExitStack()
        self._failures: IO[bytes] | None = None
        try:
            done.parent.mkdir(parents=True, exist_ok=True)
            failed.unlink(missing_ok=True)
            self._done = self._files.enter_context(_open_private(done))
            lines, _, partial = self._done.read().rpartition(b"\n")
            self._known.update(bytes.fromhex(line.decode()) for line in lines.splitlines())
            self._done.truncate(self._done.tell() - len(partial))  # line of a killed run
        except (OSError, ValueError) as error:
            self._files.close()
            raise MtaError(f"{done} is not the state of an import, or cannot be written: {error}") from error

    def close(self) -> None:
        self._files.close()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._known

    def add(self, digest: bytes) -> None:
        """Record that a person is imported."""
        self._known.add(digest)
        self._done.write(digest.hex().encode() + b"\n")
        self._done.flush()

    def fail(self, person: PersonEntry, reason: str) -> None:
        """Record why a person cannot be imported."""
        if self._failures is None:
            self._failures = self._files.enter_context(_open_private(self.failed))
        self._failures.write(orjson.dumps({"entry": person.place, "user_id": person.user_id, "reason": reason}) + b"\n")
        self._failures.flush()


@dataclass
class Import:
    """One run of an import; `on_count` is called after each person."""

    gateway: RetryingGateway
    journal: Journal
    on_count: Callable[[ImportCounts], None] = lambda counts: None
    counts: ImportCounts = field(default_factory=ImportCounts)
    _lock: Lock = field(default_factory=Lock)

    def run(self, path: Path, at_a_time: int) -> ImportCounts:
        """Import the people of a file with at most `at_a_time` requests in flight.

        Raises MtaError if the file cannot be read or the gateway is down for too long; the journal stays valid.
        """
        sent: set[Future[None]] = set()
        with ThreadPoolExecutor(at_a_time) as threads:
            try:
                for person in read_people(path):
                    if person.fault:
                        self._record(person, person.fault)
                    elif person.digest(self.gateway.url) in self.journal:
                        with self._lock:
                            self.counts.skipped += 1
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
        except RequestRefused as error:
            self._record(person, str(error))
        else:
            self._record(person)

    def _record(self, person: PersonEntry, failed: str = "") -> None:
        with self._lock:
            if failed:
                self.journal.fail(person, failed)
                self.counts.failed += 1
            else:
                self.journal.add(person.digest(self.gateway.url))
                self.counts.imported += 1
            self.on_count(self.counts)


def count_people(path: Path) -> int:
    """Return the number of people in a file; raise MtaError if it cannot be read."""
    return sum(1 for _ in _entries(path))


def read_people(path: Path) -> Iterator[PersonEntry]:
    """Yield the people in a file in order; raise MtaError if it cannot be read."""
    seen: set[str] = set()
    for place, raw in _entries(path):
        person = _person(place, raw)
        if person.user_id in seen:
            fault = f"{excerpt(person.user_id)} is in the file twice: merge the entries"
            person = PersonEntry(place, person.user_id, [], fault)
        elif person.user_id:
            seen.add(person.user_id)
        yield person


def _entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the entries of a file with their places: objects of a list, or undecoded lines."""
    try:
        with path.open("rb") as file:
            is_list = file.read(_SNIFF_BYTES).lstrip()[:1] == b"["
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
    raw_id = raw.get("user_id", raw.get("id"))
    if isinstance(raw_id, bool) or not isinstance(raw_id, str | int):
        return PersonEntry(place, "", [], f"it has no user_id (or id), got {excerpt(raw)}")
    try:
        user_id = check_user_id(str(raw_id))
    except ValueError as error:
        return PersonEntry(place, "", [], f"user_id {error}, got {excerpt(raw_id)}")
    items = raw.get("profile", raw.get("items"))
    if not isinstance(items, list) or not items:
        return PersonEntry(place, user_id, [], f"it has no profile: a list of items, got {excerpt(items)}")
    return PersonEntry(place, user_id, [{"text": item} if isinstance(item, str) else item for item in items])


def _open_private(path: Path) -> IO[bytes]:
    """Open a file for reading and appending, readable only by its owner because it holds personal data."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+b")
