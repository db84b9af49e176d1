"""The folder that `mta up` owns: the lock, the secret, Valkey's files, the logs."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import MtaError

MAX_LOG_BYTES = 64 << 20
"""A log that grows beyond this is started afresh."""

_HANDOVER_S = 5.0
_SECRET_BYTES = 32


class StartError(MtaError):
    """Something that `mta up` needs is taken, missing, or did not become ready; the message says which and why."""


@dataclass(frozen=True, slots=True)
class DataFolder:
    """A data folder in use by this process, until `close`."""

    path: Path
    lock: int  # guards hold it too, so that the folder stays taken until the last part of a killed `mta up` is gone
    secret: str  # keys the hash of user ids; made once, never changed

    @classmethod
    def open(cls, path: Path) -> DataFolder:
        """Make the folder if need be and lock it; StartError if another `mta up` uses it or it cannot be written."""
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock = _lock(path / "lock")
            for name in ("valkey", "logs"):
                (path / name).mkdir(exist_ok=True, mode=0o700)
            return cls(path, lock, _secret(path / "secret"))
        except OSError as error:
            raise StartError(f"cannot use the data folder {path}: {error}. Choose another with --data DIR") from error

    def log(self, part: str) -> Path:
        """The log of a part's newest run; that of the run before lies beside it as `<part>.log.1`."""
        return self.path / "logs" / f"{part}.log"

    def begin_log(self, part: str) -> int:
        """A descriptor that appends to a new log; of no file where there can be none: a full disk prevents no start."""
        log = self.log(part)
        try:
            if log.exists():
                log.replace(log.with_suffix(".log.1"))
            return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        except OSError:
            return os.open(os.devnull, os.O_WRONLY)

    def empty_large_log(self, part: str) -> None:
        """Move the content of a running part's log to `<part>.log.1` when it has grown too large.

        The file stays, since the part appends to it. What is written between copying and emptying is lost.
        """
        log = self.log(part)
        if log.stat().st_size > MAX_LOG_BYTES:
            shutil.copy(log, log.with_suffix(".log.1"))
            os.truncate(log, 0)

    def close(self) -> None:
        """Unlock the folder."""
        os.close(self.lock)


def _lock(path: Path) -> int:
    """Lock the file for this process, and write our pid into it for the next process to read."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline_s = time.monotonic() + _HANDOVER_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
            if Path(f"/proc/{holder}").exists() or time.monotonic() > deadline_s:
                os.close(handle)
                raise StartError(
                    f"the data folder {path.parent} is in use by another `mta up` (process {holder or 'unknown'}): "
                    "stop that one, or give this one its own with --data DIR and --port N"
                ) from None
            time.sleep(0.1)  # it was killed, and its parts are still ending
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    return handle


def _secret(path: Path) -> str:
    """The secret in `path`; if there is none, it is made and on disk before anything is keyed with it."""
    if not path.exists():
        draft = path.with_suffix(".tmp")
        write_private(draft, secrets.token_hex(_SECRET_BYTES) + "\n")
        draft.rename(path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    secret = path.read_text("ascii").strip()
    if len(secret) < _SECRET_BYTES:
        raise StartError(f"{path} holds no secret: restore it, or delete it and lose the link to all stored users")
    return secret


def write_private(path: Path, text: str) -> None:
    """Write a new file that nobody else can read; it is on disk when this returns."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
