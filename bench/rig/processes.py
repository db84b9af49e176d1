"""Start, watch and stop real processes."""

from __future__ import annotations

import asyncio
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

PATIENCE_S = 60.0
"""Default timeout of waits in seconds; it makes no claim about speed."""


async def sleep_until(at_s: float) -> None:
    """Sleep until a time of the performance counter, not at all if it has passed: arrivals do not drift."""
    await asyncio.sleep(max(0.0, at_s - time.perf_counter()))


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
    """Poll `condition` until it holds; AssertionError naming `what` if that takes longer than `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {timeout_s:.0f} s in vain for {what}"
        time.sleep(0.05)


def answers(url: str, headers: Mapping[str, str] | None = None) -> bool:
    """Whether a server answers 200; False as well if it takes no connection or breaks it."""
    try:
        return httpx.get(url, headers=headers, timeout=5).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def alive(pid: int) -> bool:
    """Whether a process is running; a zombie is not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def children(pid: int) -> list[int]:
    """Return the direct children of a process."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text("utf-8", "replace").rpartition(")")[2].split()
            if int(fields[1]) == pid and fields[0] not in "ZX":
                found.append(int(stat.parent.name))
    return found


def descendants(pid: int) -> list[int]:
    """Return all descendants of a process, parents before children."""
    found = children(pid)
    for child in found:  # the list grows during the loop
        found += children(child)
    return found


@contextmanager
def paused(*pids: int) -> Iterator[None]:
    """Pause processes until the block ends: their connections stay open without answers."""
    try:
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


def memory_mib(pid: int) -> float:
    """Return a process's resident set in MiB; 0 if there is no such process."""
    with suppress(FileNotFoundError):
        for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    return 0.0


def command_line(pid: int) -> str:
    """Return a process's argv, as every local user can read it."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")


class Background:
    """A command in the background whose output is kept; None in the environment removes a variable."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str | None] | None = None, cwd: Path | None = None
    ) -> None:
        merged: dict[str, str | None] = {**os.environ, **(environment or {})}
        self._chunks: list[bytes] = []
        self._deaf = threading.Event()
        self.process = subprocess.Popen(
            command,
            env={name: value for name, value in merged.items() if value is not None},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def output(self) -> str:
        """The output so far."""
        return b"".join(self._chunks).decode("utf-8", "replace")

    def wait_for(self, pattern: str, timeout_s: float = PATIENCE_S) -> re.Match[str]:
        """Wait for a matching line of output; AssertionError with the output if the command ends or takes too long."""
        deadline_s = time.monotonic() + timeout_s
        while not (match := re.search(pattern, self.output, re.MULTILINE)):
            ended = self.process.poll() is not None and not self._reader.is_alive()
            assert not ended, f"ended with status {self.process.returncode} before {pattern!r}:\n{self.output}"
            assert time.monotonic() < deadline_s, f"no {pattern!r} after {timeout_s:.0f} s:\n{self.output}"
            time.sleep(0.05)
        return match

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Wait until the command ends and its output is read; return its exit status."""
        code = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return code

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process alone, not to its group."""
        self.process.send_signal(number)

    def stop_reading(self) -> None:
        """Close our end of the output pipe."""
        self._deaf.set()
        self._reader.join()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as pipe:
            while not self._deaf.is_set():
                if select.select([pipe], [], [], 0.1)[0]:
                    chunk = os.read(pipe.fileno(), 1 << 16)
                    if not chunk:
                        return
                    self._chunks.append(chunk)


@contextmanager
def running(
    command: Sequence[str], environment: Mapping[str, str | None] | None = None, cwd: Path | None = None
) -> Iterator[Background]:
    """Run a background command, and end it with all its descendants when the block ends."""
    background = Background(command, environment, cwd)
    try:
        yield background
    finally:
        if background.process.poll() is None:
            background.send(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                background.process.wait(PATIENCE_S)
        left = (
            [background.process.pid, *descendants(background.process.pid)] if background.process.poll() is None else []
        )
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.killpg(background.process.pid, signal.SIGKILL)  # who outlives the command itself
        background.wait()


def mta(*arguments: str) -> list[str]:
    """Return an `mta` command line for this interpreter."""
    return [sys.executable, "-m", "server.cli", *arguments]
