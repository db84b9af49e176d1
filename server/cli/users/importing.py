"""Profiles by the thousand: a file's people into a gateway, a few at a time, from where the last run stopped."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import orjson

from adapters.errors import MtaError
from server.cli.users.gateway import Gateway, Refused, user_path
from server.cli.users.people import Person, read_people

_OUT = Path("out")


@dataclass(slots=True)
class Counts:
    """How far an import is.

    Attributes:
        imported: written by this run.
        before: that an earlier run had written.
        failed: that cannot be.
    """

    imported: int = 0
    before: int = 0
    failed: int = 0

    @property
    def seen(self) -> int:
        """All of them."""
        return self.imported + self.before + self.failed


class Journal:
    """What is done, a hash a line, and what failed, with reasons; a context manager.

    Args:
        done: the file of what is done; it stays, and the next run reads it.
        failed: the file of what failed in this run.

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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._known

    def add(self, digest: bytes) -> None:
        """Note somebody as done."""
        self._known.add(digest)
        self._done.write(digest.hex().encode() + b"\n")
        self._done.flush()

    def fail(self, person: Person, reason: str) -> None:
        """Note why somebody failed."""
        if self._failures is None:
            self._failures = self._files.enter_context(_private(self.failed))
        self._failures.write(orjson.dumps({"entry": person.place, "user_id": person.user_id, "reason": reason}) + b"\n")
        self._failures.flush()


@dataclass(slots=True)
class Import:
    """One run.

    Attributes:
        gateway: where to.
        journal: what is done.
        told: called after every person.
        counts: how far it is.
    """

    gateway: Gateway
    journal: Journal
    told: Callable[[Counts], None] = lambda counts: None
    counts: Counts = field(default_factory=Counts)

    async def run(self, path: Path, at_a_time: int) -> Counts:
        """Import the people of a file.

        Args:
            path: the file.
            at_a_time: most requests in flight.

        Raises:
            MtaError: when the file cannot be read, or the gateway is away for too long; what is done is noted.
        """
        people = read_people(path)
        sending = [asyncio.create_task(self._send(people)) for _ in range(at_a_time)]
        try:
            await asyncio.gather(*sending)
        finally:
            for task in sending:
                task.cancel()
            await asyncio.gather(*sending, return_exceptions=True)
        return self.counts

    async def _send(self, people: Iterator[Person]) -> None:
        """Send one after another of those that nobody has taken."""
        for person in people:
            digest = person.digest(self.gateway.url)
            if person.fault:
                self._failed(person, person.fault)
            elif digest in self.journal:
                self.counts.before += 1
            else:
                try:
                    await self.gateway.call("PUT", user_path(person.user_id, "profile"), {"items": person.items})
                except Refused as error:
                    self._failed(person, str(error))
                else:
                    self.journal.add(digest)
                    self.counts.imported += 1
            self.told(self.counts)
            if not self.counts.seen % 256:
                await asyncio.sleep(0)  # a long stretch that is done already must not keep the others waiting

    def _failed(self, person: Person, reason: str) -> None:
        self.journal.fail(person, reason)
        self.counts.failed += 1


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
