"""A copy of the store on disk: a folder with one compressed file and a manifest, which is written last.

The file is a sequence of entries: a line of JSON (name, expiry in ms and number of bytes of each key), then the keys'
contents. The folder's name is the time at which the copy began. Only its owner can read it: it holds personal data.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import orjson

from adapters.errors import MtaError
from bank.manifest import file_sha256
from server.observability.audit import sync
from server.store.backup.copying import Entry, StoreCopying
from server.store.redis import keys

FORMAT = 1
MANIFEST, DATA = "manifest.json", "store.gz"
_NAME, _DATED = "%Y-%m-%dT%H%M%S.%fZ", "[0-9]*T*Z"


@dataclass(frozen=True, slots=True)
class Manifest:
    format: int
    began: str  # ISO 8601: every write acknowledged before is in the copy
    keys: int
    users: int
    sha256: str  # of the compressed file
    secret: str  # check value of the MTA_SECRET that keys its users; empty if no gateway ever ran on the store
    store: str  # server and version, such as `valkey 9.1.0`

    @property
    def began_s(self) -> float:  # since 1970
        return datetime.fromisoformat(self.began).timestamp()


async def write_copy(copies: Path, store: StoreCopying, progress: Callable[[int, int], None]) -> tuple[Path, Manifest]:
    """Write a copy to a new folder in `copies`; `progress` is as in `StoreCopying`. An error leaves no folder."""
    began, stored, users = datetime.now(UTC), 0, 0
    folder = copies / began.strftime(_NAME)
    data, draft = folder / DATA, folder / "draft"
    try:
        folder.mkdir(parents=True, mode=0o700)
        for path in (data, draft):
            path.touch(mode=0o600)
        with gzip.open(data, "wb", compresslevel=1) as file:
            async for entry in store.entries(progress):
                header = orjson.dumps([(name, expires_ms, len(content)) for name, expires_ms, content in entry])
                file.write(b"".join([header, b"\n", *(content for *_, content in entry)]))
                stored, users = stored + len(entry), users + has_data(entry)
        at, sha256 = began.isoformat(timespec="milliseconds"), file_sha256(data)
        manifest = Manifest(FORMAT, at, stored, users, sha256, store.secret, store.version)
        draft.write_bytes(orjson.dumps(asdict(manifest), option=orjson.OPT_INDENT_2))
        for path in (data, draft):
            sync(path)
        draft.rename(folder / MANIFEST)
        for path in (folder, copies):  # older copies may be deleted next
            sync(path)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise MtaError(f"cannot write a copy to {folder}: {error.strerror or error}") from error
        raise
    return folder, manifest


def open_copy(folder: Path) -> Manifest:
    """Return the manifest of a copy; raise `MtaError` if the copy is incomplete, damaged or of another format."""
    try:
        manifest = Manifest(**orjson.loads((folder / MANIFEST).read_bytes()))
        sha256 = file_sha256(folder / DATA)
    except (OSError, ValueError, TypeError) as error:
        inside = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}")))
        hint = f". It contains the copies {inside}: name one" if inside else ""
        raise MtaError(f"{folder} is not a complete copy of a store: {error}{hint}") from error
    if manifest.format != FORMAT:
        raise MtaError(f"the copy {folder} has the format {manifest.format}, but this version reads {FORMAT}")
    if manifest.sha256 != sha256:
        raise MtaError(f"{folder / DATA} is damaged: its SHA-256 is {sha256}, not {manifest.sha256}")
    return manifest


def read_entries(folder: Path) -> Iterator[Entry]:
    """Yield the entries of a copy that `open_copy` has accepted."""
    with gzip.open(folder / DATA) as file:
        while header := file.readline():
            yield [(name, expires_ms, file.read(size)) for name, expires_ms, size in orjson.loads(header)]


def user_of(entry: Entry) -> str | None:  # user key; None for a shared key
    return keys.user_of(entry[0][0])


def has_data(entry: Entry) -> bool:  # of a user; somebody who was erased has a tombstone alone
    user = user_of(entry)
    return user is not None and any(name != keys.epoch(user) for name, *_ in entry)


def delete_old_copies(copies: Path, days: int) -> list[Path]:
    """Delete and return the copies, also unfinished ones, older than `days` days, but not the newest complete one."""
    newest = max((path.parent for path in copies.glob(f"{_DATED}/{MANIFEST}")), default=None)
    oldest = (datetime.now(UTC) - timedelta(days=days)).strftime(_NAME)
    dated = sorted(path.parent for path in copies.glob(f"{_DATED}/{DATA}"))
    old = [folder for folder in dated if folder.name < oldest and folder != newest]
    try:
        for folder in old:
            shutil.rmtree(folder)
    except OSError as error:
        raise MtaError(f"cannot delete the old copy {folder}: {error.strerror or error}") from error
    return old
