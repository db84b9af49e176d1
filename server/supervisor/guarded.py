"""A running part, seen through its guard (`guard.py` says what the guard promises)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from server.supervisor.part import Part

_GUARD = Path(__file__).with_name("guard.py")
GRACE_S = 2.0
"""From the end of `mta up`, whatever its cause, to SIGKILL for what still runs."""

_TAIL_BYTES = 16 << 10
_RUN = b"==== mta up starts "
"""Starts the line in a log that marks the beginning of a run."""


def guarded(command: Sequence[str], grace_s: float, niceness: int = 0) -> list[str]:
    """The command, run under a guard.

    Args:
        command: program and arguments.
        grace_s: how long it may take to stop, once our end of its standard input is closed.
        niceness: above 0 it stands back behind others, with all that it starts.
    """
    return [sys.executable, "-I", str(_GUARD), str(grace_s), str(niceness), *command]


class GuardedProcess:
    """One run of a part, from spawn to the end of its last descendant."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log
        self._started_s = time.monotonic()

    @classmethod
    async def start(cls, part: Part, log: Path, keep_open: tuple[int, ...] = ()) -> GuardedProcess:
        """Start a part under a guard of its own, its output appended to `log`.

        Args:
            part: what to run.
            log: a file; created if missing.
            keep_open: file descriptors that the guard, but not the part, holds while it lives.
        """
        handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            with suppress(OSError):  # a full disk must not prevent a start
                os.write(handle, _RUN + f"{part.name} {now}\n".encode())
            process = await asyncio.create_subprocess_exec(
                *guarded(part.command, GRACE_S, part.niceness),
                stdin=asyncio.subprocess.PIPE,
                stdout=handle,
                stderr=handle,
                env=dict(part.environment),
                pass_fds=keep_open,
                start_new_session=True,  # Ctrl-C is for us to handle: parts stop in order
            )
        finally:
            os.close(handle)
        return cls(process, log)

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_s

    @property
    def running(self) -> bool:
        """Whether the guard, and so perhaps the part, still runs."""
        return self._process.returncode is None

    async def wait(self) -> int:
        """Wait until the part and all its descendants are gone; returns its status, 128 + n after signal n."""
        code = await self._process.wait()
        if code < 0:  # the guard itself was killed, and could not clean up: the rest of its group is ours to end
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            return 128 - code
        return code

    async def stop(self, timeout_s: float) -> int:
        """Ask the part to finish; kill it and its descendants if it has not after `timeout_s`."""
        self._ask()
        try:
            return await asyncio.wait_for(self.wait(), timeout_s)
        except TimeoutError:
            return await self.kill()

    async def kill(self) -> int:
        """End the part and its descendants now, within the guard's grace period."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            return await asyncio.wait_for(self.wait(), 2 * GRACE_S)
        except TimeoutError:  # the guard does not answer
            self._process.kill()
            return await self.wait()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of this run's output."""
        with self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - _TAIL_BYTES))
            text = newest_run(file.read())
        return "\n".join(text.rstrip().splitlines()[-lines:])

    def _ask(self) -> None:
        if self._process.stdin is not None and self.running:
            with suppress(BrokenPipeError, ConnectionResetError):
                self._process.stdin.write(b".")


def newest_run(log: bytes) -> str:
    """The newest run's output, from a log or the end of one; all of it if the log was emptied since the run began."""
    _, begun, written = log.rpartition(_RUN)
    return (written.partition(b"\n")[2] if begun else log).decode("utf-8", "replace")
