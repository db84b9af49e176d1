"""Trivial parts, a supervisor that runs them, and what it says of them."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.rig.processes import PATIENCE_S
from server.supervisor.data_folder import DataFolder
from server.supervisor.services import Part
from server.supervisor.supervisor import State, Supervisor

SLEEP = "import time; time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
FAMILY = f"""
import subprocess, sys
# One child in our group, one in a session of its own, one that outlives its parent; none of them heeds SIGTERM.
subprocess.Popen([sys.executable, "-c", {STUBBORN!r}])
subprocess.Popen([sys.executable, "-c", {STUBBORN!r}], start_new_session=True)
orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
subprocess.run([sys.executable, "-c", orphan, {STUBBORN!r}])
"""
FAMILY_SIZE = 4  # the part and the three


class Record:
    """A report that keeps what it was told."""

    def __init__(self) -> None:
        self.states: list[tuple[str, State]] = []
        self.details: list[str] = []

    def __call__(self, part: str, state: State, detail: str) -> None:
        self.states.append((part, state))
        self.details.append(detail)

    def count(self, part: str, state: State) -> int:
        return self.states.count((part, state))

    def of(self, part: str, state: State) -> list[str]:
        """The details of each such change."""
        return [detail for seen, detail in zip(self.states, self.details, strict=True) if seen == (part, state)]


@pytest.fixture(autouse=True)
def quick_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.supervisor.FIRST_RESTART_DELAY_S", 0.01)


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataFolder]:
    folder = DataFolder.open(tmp_path / "data")
    yield folder
    folder.close()


def python_part(name: str, folder: Path, code: str, **changes: float) -> Part:
    """A part that runs `code`, and is ready once it has written its pid to `<name>.pid`."""
    pid_file = folder / f"{name}.pid"
    ends = f"draft = {str(pid_file)!r} + '.tmp'; open(draft, 'w').write(str(os.getpid())); os.rename(draft, draft[:-4])"

    async def ready() -> bool:
        return pid_file.exists()

    command = (sys.executable, "-c", f"import os\n{code.strip()}\n{ends}\n{SLEEP}")
    times = {"start_timeout_s": PATIENCE_S, "stop_timeout_s": PATIENCE_S} | changes
    return Part(name, command, dict(os.environ), ready, "", **times)


def pid_of(name: str, folder: Path) -> int:
    return int((folder / f"{name}.pid").read_text())


async def run_until(
    condition: Callable[[Record], bool],
    data: DataFolder,
    *parts: Part,
    hurry: bool = False,
    record: Record | None = None,
) -> Record:
    """Supervise the parts until all were tried and the condition holds; what was reported."""
    stop, hurried, started, record = asyncio.Event(), asyncio.Event(), asyncio.Event(), record or Record()
    running = asyncio.create_task(Supervisor(parts, data, record).run(stop, hurried, started.set))
    async with asyncio.timeout(PATIENCE_S):
        while not running.done() and not (started.is_set() and condition(record)):
            await asyncio.sleep(0.02)
        stop.set()
        if hurry:
            hurried.set()
        await running
    return record


def at_once(record: Record) -> bool:
    return True
