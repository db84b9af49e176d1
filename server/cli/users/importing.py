"""Import people from a file or folder into a gateway, which checks the items, and continue interrupted imports."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING, Any

import orjson

from adapters.errors import MtaError, excerpt
from bank.items.folders import people_in, read_person
from bank.items.tasks import Task, get_task
from server.cli.users.gateway import RequestRefused, gateway_errors
from server.store.tenants.user_key import check_user_id

if TYPE_CHECKING:
    from mta_client import Client

OUTCOMES = "imported", "skipped", "failed"
CHAT = get_task("chat")
_READ_AHEAD = 64  # maximum number of people in memory


@dataclass(frozen=True, slots=True)
class PersonEntry:
    place: int  # line or entry number in the file, from 1
    user_id: str
    items: list[Any]
    fault: str = ""  # why the entry is invalid
    left_out: int = 0  # files, mails or lines of the person's folder


class Journal:
    """The imported people of all runs, two hashes per line, and the failures of this run with reasons.

    Both files are next to the file of `people`, or in `out/` if its folder is read-only.
    """

    def __init__(self, people: Path, state: Path | None = None) -> None:
        folder = people.parent if os.access(people.parent, os.W_OK) else Path("out")
        done = state or folder / f"{people.name}.imported"
        self.failed = done.with_name(f"{people.name}.failed.ndjson")
        try:
            done.parent.mkdir(parents=True, exist_ok=True)
            self.failed.unlink(missing_ok=True)
            self._done = _open_private(done)
            *lines, partial = self._done.read().split(b"\n")
            self.known = dict(line.decode().split() for line in lines)
            self._done.truncate(self._done.tell() - len(partial))  # line of a killed run
        except (OSError, ValueError) as error:
            raise MtaError(f"{done} is not the state of an import, or cannot be written: {error}") from error

    def close(self) -> None:
        self._done.close()

    def add(self, person: str, content: str) -> None:
        self.known[person] = content
        self._done.write(f"{person} {content}\n".encode())
        self._done.flush()

    def fail(self, person: PersonEntry, reason: str) -> None:
        with _open_private(self.failed) as file:
            file.write(orjson.dumps({"entry": person.place, "user_id": person.user_id, "reason": reason}) + b"\n")


def import_people(
    client: Client,
    journal: Journal,
    path: Path,
    at_a_time: int,
    on_person: Callable[[int], None] = lambda people: None,
    task: Task = CHAT,
) -> Counter[str]:
    """Import people; count those imported by this run, skipped as imported before, and failed, and texts left out.

    `on_person` is called after each person, with the number of people so far. MtaError, with a valid journal, if the
    file or, for too long, the gateway fails.
    """
    counts, lock, begun = Counter[str](), Lock(), deque[Future[None]]()

    def put(person: PersonEntry) -> None:
        identity, fault = [client.url, person.user_id], person.fault
        who, content = _hash(identity), _hash([*identity, person.items])
        known = journal.known.get(who) == content
        if not (fault or known):
            try:
                with gateway_errors(client):
                    client.put_profile(person.user_id, person.items)
            except RequestRefused as error:
                fault = str(error)
        with lock:
            if fault:
                journal.fail(person, fault)
            elif not known:
                journal.add(who, content)
            counts["failed" if fault else "skipped" if known else "imported"] += 1
            on_person(sum(counts[each] for each in OUTCOMES))

    with ThreadPoolExecutor(at_a_time) as threads:
        try:
            for person in read_people(path, task):
                counts["left out"] += person.left_out
                begun.append(threads.submit(put, person))
                if len(begun) > _READ_AHEAD:
                    begun.popleft().result()
            for one in begun:
                one.result()
        finally:
            client.stop()
    return counts


def read_people(path: Path, task: Task = CHAT) -> Iterator[PersonEntry]:
    """Yield the people of a file, or of a folder with texts for this task."""
    seen: set[str] = set()
    for position, raw in entries(path):
        person = _from_folder(position, raw, task) if isinstance(raw, Path) else _person(position, raw)
        user_id = unicodedata.normalize("NFC", person.user_id)  # as the server does
        if user_id in seen:
            person = replace(person, fault=f"{excerpt(person.user_id)} is there twice: merge the entries")
        elif user_id:
            seen.add(user_id)
        yield person


def entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield what a file or folder holds, with places: objects of a list, lines, or paths; MtaError if unreadable."""
    if path.is_dir():
        yield from enumerate(people_in(path), 1)
        return
    try:
        with path.open("rb") as file:
            is_list = file.read(1 << 20).lstrip()[:1] == b"["
            file.seek(0)
            if is_list:
                yield from enumerate(orjson.loads(file.read()), 1)
            else:
                yield from ((position, line) for position, line in enumerate(file, 1) if line.strip())
    except OSError as error:
        raise MtaError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise MtaError(f"{path} is not JSON: {error}") from error


def _from_folder(position: int, path: Path, task: Task) -> PersonEntry:
    history = read_person(path, task)
    items = [{"id": item.id, **item.fields} for item in history.items.values()]
    person = _person(position, {"user_id": history.user_id, "profile": items})
    if not items:
        person = replace(person, fault="; ".join(f"{each.where} {each.why}" for each in history.left_out[:3]))
    return replace(person, left_out=len(history.left_out))


def _person(position: int, raw: Any) -> PersonEntry:
    if isinstance(raw, bytes):
        try:
            raw = orjson.loads(raw)
        except ValueError as error:
            return PersonEntry(position, "", [], f"it is not JSON: {error}")
    if not isinstance(raw, dict):
        return PersonEntry(position, "", [], f"it must be an object, got {excerpt(raw)}")
    raw_id = raw.get("user_id", raw.get("id"))
    if isinstance(raw_id, bool) or not isinstance(raw_id, str | int):
        return PersonEntry(position, "", [], f"it has no user_id (or id), got {excerpt(raw)}")
    try:
        user_id = check_user_id(str(raw_id))
    except ValueError as error:
        return PersonEntry(position, "", [], f"user_id {error}, got {excerpt(raw_id)}")
    items = raw.get("profile", raw.get("items"))
    if not isinstance(items, list) or not items:
        return PersonEntry(position, user_id, [], f"it has no profile: a list of items, got {excerpt(items)}")
    return PersonEntry(position, user_id, [{"text": item} if isinstance(item, str) else item for item in items])


def _hash(value: object) -> str:
    """Return the SHA-256 of a value, shortened; it identifies nobody."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def _open_private(path: Path) -> IO[bytes]:
    """Open a file for reading and appending, readable only by its owner because it holds personal data."""
    return os.fdopen(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+b")
