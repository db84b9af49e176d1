"""The audit log: who did what, as one JSON object per line in a file that other programs may rotate.

Lines hold keys and hashes, never a text, a name or a secret.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from adapters.errors import MtaError, excerpt
from server.errors import Unavailable
from server.observability.logs import request_id

_path: Path | None = None


class Act(StrEnum):
    ERASE = "erase"
    EXPORT = "export"
    SERVE = "serve"  # a kept version of a user's adapter
    KEY_CREATED = "key_created"
    KEY_REVOKED = "key_revoked"
    BANK_CHOSEN = "bank_chosen"  # for a tenant
    QUOTA_SET = "quota_set"  # of a tenant
    BACKUP = "backup"
    RESTORE = "restore"
    SECRET_EXCHANGED = "secret_exchanged"  # outcome `begun`, or `done`: nobody is left under the old one


def audit_to(path: Path | None) -> None:
    """Write the audit log of this process to a file, or nowhere; MtaError if the file cannot be opened."""
    global _path  # noqa: PLW0603  a process has one, as it has one root logger
    file = path and path.expanduser()
    try:
        _write(file, b"")
    except OSError as error:
        raise MtaError(f"cannot write the audit log {path} (MTA_AUDIT): {error.strerror or error}") from error
    _path = file


def note(act: Act, outcome: object, *, tenant: str = "", **who: object) -> None:
    """Add a line, which is on disk then, with the current request's id; Unavailable if it cannot be written.

    `outcome` is an HTTP status, `begun` or `done`; `tenant` is empty for what concerns all. `who` can have `key` (id of
    the API key that acts, or `cli`), `user` (a user key), and what the act is about: `of_key`, `bank`, `quota` or
    `copy` (the start of its SHA-256).
    """
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "act": act.value,
        "outcome": str(outcome),
        "tenant": tenant,
        "request": request_id.get(),
        **who,
    }
    entry = json.dumps({name: value for name, value in line.items() if value}, ensure_ascii=False)
    try:
        _write(_path, f"{entry}\n".encode())
    except OSError as error:
        raise Unavailable(
            f"{act} is not in the audit log (MTA_AUDIT), which cannot be written: repeat it once that is put right"
        ) from error


def room() -> tuple[int, int] | None:
    """Return the free bytes and the size of the disk that the audit log of this process is on; None without a log."""
    if _path is None:
        return None
    disk = shutil.disk_usage(_path.parent)
    return disk.free, disk.total


def _write(path: Path | None, line: bytes) -> None:
    """Add a line, whole or not at all, to a file that only its owner can read; other programs may have moved it."""
    if path is None:
        return
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        is_new = not os.fstat(file).st_size
        if (written := os.write(file, line)) < len(line):
            os.ftruncate(file, os.fstat(file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file)
    finally:
        os.close(file)
    if is_new:
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the list of a folder's files, is on disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def read_audit(
    path: Path, wanted: Mapping[str, Collection[str]], since: datetime | None = None
) -> Iterator[dict[str, str]]:
    """Yield the entries of an audit log that have one of these values each; MtaError names a line that is none."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                entry = _entry(line, path, number)
                if since and datetime.fromisoformat(entry["time"]) < since:
                    continue
                if all(entry.get(name) in values for name, values in wanted.items()):
                    yield entry
    except (OSError, UnicodeDecodeError) as error:
        raise MtaError(f"cannot read the audit log {path}: {error}") from error


def _entry(line: str, path: Path, number: int) -> dict[str, str]:
    try:
        entry: dict[str, str] = json.loads(line)
        datetime.fromisoformat(entry["time"])
    except (ValueError, LookupError, TypeError) as error:
        raise MtaError(f"line {number} of {path} is not an entry of an audit log: {excerpt(line)}") from error
    return entry
