"""Imports the profiles of a file's people into a gateway, a few at a time, from where the last run stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import orjson

from adapters.errors import MtaError
from server.cli.users.patience import PatientGateway, Refused
from server.cli.users.people import PersonEntry, read_people

_OUT = Path("out")


@dataclass(slots=True)
class ImportCounts:
    """How many people this run has imported, an earlier run had, and cannot be."""

    imported: int = 0
    before: int = 0
    failed: int = 0

    @property
    def seen(self) -> int:
        """All of these."""
        return self.imported + self.before + self.failed


class Journal:
    """What is done, a hash a line, and what failed in this run, with reasons.

    The file of what is done stays, and the next run reads it.

    Raises:
        MtaError: when the files cannot be written.
    """

    def __init__(self, done: Path, failed: Path) -> None:
        self.done, self.failed = done, failed
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
        """Close both files."""
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


@dataclass(slots=True)
class Import:
    """One run; `on_count` is called after every person."""

    gateway: PatientGateway
    journal: Journal
    on_count: Callable[[ImportCounts], None] = lambda counts: None
    counts: ImportCounts = field(default_factory=ImportCounts)

    def run(self, path: Path, at_a_time: int) -> ImportCounts:
        """Import the people of a file, with so many requests in flight at most.

        Raises:
            MtaError: when the file cannot be read, or the gateway is away for too long; what is done is noted.
        """
        sent: set[Future[tuple[PersonEntry, str]]] = set()
        with ThreadPoolExecutor(at_a_time) as threads:
            try:
                for person in read_people(path):
                    if person.fault:
                        self._note(person, person.fault)
                    elif person.digest(self.gateway.url) in self.journal:
                        self.counts.before += 1
                        self.on_count(self.counts)
                    else:
                        sent.add(threads.submit(self._send, person))
                        if len(sent) == at_a_time:
                            sent = self._settle(sent, FIRST_COMPLETED)
                self._settle(sent, ALL_COMPLETED)
            finally:
                self.gateway.stop()
        return self.counts

    def _send(self, person: PersonEntry) -> tuple[PersonEntry, str]:
        """Them, and why their profile was refused; nothing if it was not."""
        try:
            self.gateway.call(lambda client: client.put_profile(person.user_id, person.items))
        except Refused as error:
            return person, str(error)
        return person, ""

    def _settle(self, sent: set[Future[tuple[PersonEntry, str]]], when: str) -> set[Future[tuple[PersonEntry, str]]]:
        """Note what has been answered, and return the rest."""
        answered, rest = wait(sent, return_when=when)
        for one in sorted(answered, key=lambda one: one.exception() is not None):
            self._note(*one.result())
        return rest

    def _note(self, person: PersonEntry, failed: str) -> None:
        if failed:
            self.journal.fail(person, failed)
            self.counts.failed += 1
        else:
            self.journal.add(person.digest(self.gateway.url))
            self.counts.imported += 1
        self.on_count(self.counts)


def journal_of(path: Path, state: Path | None = None) -> Journal:
    """The journal of a file's import: beside the file, or under `out/` where nothing can be written beside it.

    Raises:
        MtaError: when it cannot be written.
    """
    folder = path.parent if os.access(path.parent, os.W_OK) else _OUT
    done = state or folder / f"{path.name}.imported"
    return Journal(done, done.with_name(f"{path.name}.failed.ndjson"))


def _private(path: Path) -> IO[bytes]:
    """A file to read and append to that only its owner reads: it is about people."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+b")
