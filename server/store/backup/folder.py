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
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, NamedTuple

import orjson

from adapters.errors import MtaError
from server.store.redis import keys

FORMAT = 1
MANIFEST, DATA = "manifest.json", "store.gz"
_NAME = "%Y-%m-%dT%H%M%SZ"


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
    began: str  # ISO 8601, UTC: every write acknowledged before is in the copy
    keys: int
    users: int
    sha256: str  # of the compressed file
    secret: str  # keyed hash by which MTA_SECRET is recognised
    store: str  # server and version, such as `valkey 9.1.0`

    @property
    def began_at(self) -> datetime:
        return datetime.fromisoformat(self.began)

    @property
    def name(self) -> str:  # of the folder
        return self.began_at.strftime(_NAME)

    @property
    def short(self) -> str:  # for the audit log
        return self.sha256[:12]


class CopyWriter:
    """Writes a new copy in a folder of copies; raises `MtaError` if it cannot be written."""

    def __init__(self, copies: Path, secret: str) -> None:
        self._began, self._secret = datetime.now(UTC), secret
        self._keys = self._users = 0
        self.folder = copies / self._began.strftime(_NAME)
        try:
            copies.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.folder.mkdir(mode=0o700)
            self._file = gzip.GzipFile(fileobj=_create(self.folder / DATA), mode="wb", compresslevel=1, mtime=0)
        except OSError as error:
            raise MtaError(f"cannot write a copy to {self.folder}: {error.strerror or error}") from error

    def add(self, entry: Entry) -> None:
        header = orjson.dumps([(key.name, key.expires_ms, len(key.content)) for key in entry])
        try:
            self._file.write(b"".join([header, b"\n", *(key.content for key in entry)]))
        except OSError as error:
            raise MtaError(f"cannot write to {self.folder}: {error.strerror or error}") from error
        self._keys += len(entry)
        self._users += user_of(entry) is not None

    def finish(self, store: str) -> Manifest:
        """Complete the copy: it can be restored from now on."""
        data, manifest = self.folder / DATA, self.folder / MANIFEST
        try:
            raw = self._file.fileobj
            assert raw is not None
            self._file.close()
            _sync(raw)
            began = self._began.isoformat(timespec="milliseconds")
            done = Manifest(FORMAT, began, self._keys, self._users, _sha256(data), self._secret, store)
            draft = manifest.with_suffix(".tmp")
            with _create(draft) as file:
                file.write(orjson.dumps(asdict(done), option=orjson.OPT_INDENT_2) + b"\n")
                _sync(file)
            draft.rename(manifest)
        except OSError as error:
            raise MtaError(f"cannot complete the copy {self.folder}: {error.strerror or error}") from error
        return done

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def open_copy(folder: Path) -> Manifest:
    """Return the manifest of a copy; raise `MtaError` if the copy is incomplete, damaged or of another format."""
    try:
        manifest = Manifest(**orjson.loads((folder / MANIFEST).read_bytes()))
        sha256 = _sha256(folder / DATA)
    except FileNotFoundError as error:
        inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST}"))
        hint = f"; it contains the copies {', '.join(inside)}: name one" if inside else ""
        missing = Path(error.filename).name
        raise MtaError(f"{folder} is not a complete copy of a store: it has no {missing}{hint}") from error
    except (OSError, ValueError, TypeError) as error:
        raise MtaError(f"cannot read the copy {folder}: {error}") from error
    if manifest.format != FORMAT:
        raise MtaError(f"the copy {folder} has the format {manifest.format}, this version reads {FORMAT}")
    if sha256 != manifest.sha256:
        raise MtaError(f"the copy {folder} is damaged: {DATA} has the SHA-256 {sha256}, not {manifest.sha256}")
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
    oldest, deleted = datetime.now(UTC) - timedelta(days=days), []
    for folder in sorted(copies.iterdir()):
        with suppress(ValueError):
            if datetime.strptime(folder.name, _NAME).replace(tzinfo=UTC) < oldest:
                deleted.append(folder)
    for folder in deleted:
        try:
            for name in (MANIFEST, f"{Path(MANIFEST).stem}.tmp", DATA):
                (folder / name).unlink(missing_ok=True)
            folder.rmdir()
        except OSError as error:
            raise MtaError(f"cannot delete the old copy {folder}: {error.strerror or error}") from error
    return deleted


def _create(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
