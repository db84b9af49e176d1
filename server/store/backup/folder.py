"""A copy of the store on disk: a folder with one compressed file and a manifest, which is written last.

The file is a sequence of entries: a line of JSON (name, expiry in ms and number of bytes of each key), then the keys'
contents. The folder's name is the time at which the copy began. Only its owner can read it: it holds personal data.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, NamedTuple

import orjson

from adapters.errors import MtaError
from server.store.redis import keys

FORMAT = 1
MANIFEST, DATA = "manifest.json", "store.gz"
_NAME = "%Y-%m-%dT%H%M%S.%fZ"


class StoredKey(NamedTuple):
    """A key of the store; `content` is what its DUMP returns."""

    name: str
    expires_ms: int  # Unix time; 0: never
    content: bytes


Entry = Sequence[StoredKey]
"""Keys of one moment: all keys of a user, or one key that users share."""


@dataclass(frozen=True, slots=True)
class Manifest:
    format: int
    began: str  # ISO 8601: every write acknowledged before is in the copy
    keys: int
    users: int
    sha256: str  # of the compressed file
    secret: str  # keyed hash by which MTA_SECRET is recognised
    store: str  # server and version, such as `valkey 9.1.0`


class CopyWriter:
    """Writes a new copy in a folder of copies. Raises `MtaError` if it cannot be written."""

    def __init__(self, copies: Path) -> None:
        began = datetime.now(UTC)
        self._began, self._keys, self._users = began.isoformat(timespec="milliseconds"), 0, 0
        self.folder = copies / began.strftime(_NAME)
        with _named_errors(f"write a copy to {copies}"):
            copies.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.mkdir(mode=0o700)
            self._raw = _create(self.folder / DATA)
        self._file = gzip.GzipFile(fileobj=self._raw, mode="wb", compresslevel=1)

    def add(self, entry: Entry) -> None:
        header = orjson.dumps([(key.name, key.expires_ms, len(key.content)) for key in entry])
        with _named_errors(f"write {self.folder}"):
            self._file.write(b"".join([header, b"\n", *(key.content for key in entry)]))
        self._keys += len(entry)
        self._users += user_of(entry) is not None

    def finish(self, secret: str, store: str) -> Manifest:
        """Complete the copy: it can be restored from now on."""
        with _named_errors(f"complete {self.folder}"):
            self._file.close()
            _sync(self._raw)
            sha256 = _sha256(self.folder / DATA)
            manifest = Manifest(FORMAT, self._began, self._keys, self._users, sha256, secret, store)
            draft = self.folder / f"{MANIFEST}.tmp"
            with _create(draft) as file:
                file.write(orjson.dumps(asdict(manifest), option=orjson.OPT_INDENT_2))
                _sync(file)
            draft.rename(self.folder / MANIFEST)
        return manifest

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def open_copy(folder: Path) -> Manifest:
    """Return the manifest of a copy; raise `MtaError` if the copy is incomplete, damaged or of another format."""
    if not (folder / MANIFEST).is_file():
        inside = ", ".join(sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}")))
        hint = f"; it contains {inside}: name one" if inside else ": a copy that was broken off cannot be restored"
        raise MtaError(f"{folder} is not a complete copy, since it has no {MANIFEST}{hint}")
    with _named_errors(f"read the copy {folder}"):
        raw, sha256 = (folder / MANIFEST).read_bytes(), _sha256(folder / DATA)
    try:
        manifest = Manifest(**orjson.loads(raw))
    except (ValueError, TypeError) as error:
        raise MtaError(f"{folder / MANIFEST} is not a manifest of format {FORMAT}: {error}") from error
    if (manifest.format, manifest.sha256) != (FORMAT, sha256):
        wanted = f"format {manifest.format} and SHA-256 {manifest.sha256}"
        raise MtaError(f"{folder / DATA} is damaged: by its manifest it has {wanted}, but it has {FORMAT} and {sha256}")
    return manifest


def read_entries(folder: Path) -> Iterator[Entry]:
    """Yield the entries of a copy that `open_copy` has accepted."""
    with gzip.open(folder / DATA) as file:
        while header := file.readline():
            yield [StoredKey(name, expires_ms, file.read(size)) for name, expires_ms, size in orjson.loads(header)]


def user_of(entry: Entry) -> str | None:  # user key; None for a shared key
    return keys.user_of(entry[0].name)


def delete_old_copies(copies: Path, days: int) -> list[Path]:
    """Delete the copies, also unfinished ones, that began more than `days` days ago, and return their folders."""
    oldest = (datetime.now(UTC) - timedelta(days=days)).strftime(_NAME)
    old = [path for path in sorted(copies.glob("[0-9]*T*Z")) if path.name < oldest and (path / DATA).exists()]
    for path in old:
        with _named_errors(f"delete the old copy {path}"):
            shutil.rmtree(path)
    return old


@contextmanager
def _named_errors(act: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MtaError(f"cannot {act}: {error.strerror or error}") from error


def _create(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
