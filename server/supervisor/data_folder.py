"""The data folder of `mta up`: the lock, the secret, Valkey's files, the audit log and the logs."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import MtaError
from server.observability.audit import sync

AUDIT_LOG = "audit.jsonl"
MAX_LOG_BYTES = 64 << 20  # size at which the log of a running part is rotated
_HANDOVER_TRIES = 50  # a tenth of a second each: longest wait for the parts of a killed `mta up` to exit
_SECRET_BYTES = 32


class StartError(MtaError):
    """Something that `mta up` needs is in use, missing or not ready; the message says what and why."""


@dataclass(frozen=True, slots=True)
class DataFolder:
    path: Path
    lock: int  # guards inherit it: if `mta up` is killed, the folder stays locked until its last part has exited
    secret: str  # keys the hash of user ids; generated once, never changed

    @classmethod
    def open(cls, path: Path) -> DataFolder:
        """Create the folder if needed and lock it; StartError if it is not writable or another `mta up` uses it."""
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = _lock(path / "lock")
            for name in ("valkey", "logs"):
                (path / name).mkdir(exist_ok=True, mode=0o700)
            return cls(path, lock, _secret(path / "secret"))
        except OSError as error:
            raise StartError(f"cannot use the data folder {path}: {error}. Choose another with --data DIR") from error

    def log(self, part: str) -> Path:
        """Return the path of a part's current log; the previous run's log is `<part>.log.1` beside it."""
        return self.path / "logs" / f"{part}.log"

    def start_log(self, part: str) -> int:
        """Open a new log for appending; fall back to /dev/null, so that a part can start on a full disk."""
        log = self.log(part)
        with suppress(OSError):
            if log.exists():
                log.replace(log.with_suffix(".log.1"))
            return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return os.open(os.devnull, os.O_WRONLY)

    def rotate_large_log(self, part: str) -> None:
        """Copy a large log and truncate it, since its part keeps it open; lines written in between are lost."""
        log = self.log(part)
        if log.stat().st_size > MAX_LOG_BYTES:
            shutil.copy(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)

    def tail(self, part: str) -> str:
        """Return the end of a part's log as the end of a message; "" if it cannot be read."""
        with suppress(OSError), self.log(part).open(encoding="utf-8", errors="replace") as lines:
            return f". The end of {lines.name}:\n{''.join(deque(lines, 20)).rstrip()}"
        return ""

    def close(self) -> None:
        os.close(self.lock)


def _lock(path: Path) -> int:
    """Lock the file for this process; our pid in it is for the error message of another `mta up`."""
    handle, holder = os.open(path, os.O_RDWR | os.O_CREAT, 0o600), ""
    for _ in range(_HANDOVER_TRIES):
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
            return handle
        holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
        if Path(f"/proc/{holder}").exists():
            break
        time.sleep(0.1)  # the holder was killed, and its parts are still exiting
    os.close(handle)
    raise StartError(
        f"the data folder {path.parent} is in use by another `mta up` (process {holder or 'unknown'}): "
        "stop that one, or give this one its own with --data DIR and --port N"
    )


def _secret(path: Path) -> str:
    """Read the secret from `path`, or generate it and sync it to disk before it is used."""
    if not path.exists():
        draft = path.with_suffix(".tmp")
        write_private(draft, secrets.token_hex(_SECRET_BYTES) + "\n")
        draft.rename(path)
        sync(path.parent)
    secret = path.read_text("ascii").strip()
    if len(secret) < _SECRET_BYTES:
        raise StartError(f"{path} holds no secret: restore it, or delete it and lose the link to all stored users")
    return secret


def write_private(path: Path, text: str) -> None:
    """Write a new file that only this user can read, and sync it to disk."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)  # all of it, or an error: a short secret would be kept for ever
        file.flush()
        os.fsync(file.fileno())
