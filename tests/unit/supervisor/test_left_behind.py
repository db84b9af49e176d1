"""What the parts of `mta up` leave behind: logs that stay small, and no process, whoever is killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from bench.rig.processes import Background, alive, descendants, wait_until
from server.supervisor.data_folder import DataFolder
from server.supervisor.services import writes
from server.supervisor.supervisor import GuardedProcess, Supervisor
from tests.unit.supervisor.conftest import FAMILY, FAMILY_SIZE, Record, pid_of, python_part, run_until

CHATTER = """
import itertools, threading, time
def chatter():
    for number in itertools.count():
        print(number, "x" * 90, flush=True)
        time.sleep(0.001)
threading.Thread(target=chatter, daemon=True).start()
"""
LIMIT = 20_000


async def test_the_log_of_a_part_that_runs_for_long_stays_small_and_keeps_the_newest(
    tmp_path: Path, data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.supervisor.data_folder.MAX_LOG_BYTES", LIMIT)
    monkeypatch.setattr("server.supervisor.supervisor.LOG_CHECK_INTERVAL_S", 0.05)
    log = data.log("chatty")
    before = log.with_suffix(".log.1")
    rotated: list[str] = []

    def three_times() -> bool:
        if before.exists() and before.stat().st_size and (start := before.read_text()[:100]) not in rotated:
            rotated.append(start)
        return len(rotated) == 3

    await run_until(Supervisor([python_part("chatty", tmp_path, CHATTER)], data, Record()), three_times)
    assert log.stat().st_size + before.stat().st_size < 10 * LIMIT
    # The part was killed, perhaps while it wrote the last line, perhaps as its log had just been begun anew.
    *lines, _ = (before.read_text() + log.read_text()).split("\n")
    numbers = [int(line.split()[0]) for line in lines]
    assert numbers == sorted(set(numbers))
    assert len(numbers) > 0.8 * (numbers[-1] - numbers[0])  # a busy machine loses what is written as a log is emptied
    assert {len(line.split()[1]) for line in lines} == {90}  # no line is cut, none is full of holes
    assert numbers[0] > 3 * LIMIT // 200


async def test_each_run_has_a_log_of_its_own_and_is_ready_once_it_says_so(tmp_path: Path, data: DataFolder) -> None:
    log = data.log("brief")
    for said, expected in (("ready: now", True), ("not yet", False)):
        part = replace(python_part("brief", tmp_path, f"print({said!r}, flush=True)"), ready=writes(log, "ready: now"))
        process = await GuardedProcess.start(part, data)
        try:
            await _guard_of("brief", tmp_path)  # by then it has said what it has to say
            assert await part.ready() is expected
            assert log.read_text() == f"{said}\n"
        finally:
            await process.kill()
            (tmp_path / "brief.pid").unlink()
    before = log.with_suffix(".log.1")
    assert before.read_text() == "ready: now\n"
    before.unlink()
    before.mkdir()  # as on a full disk, there can be no new log
    await run_until(Supervisor([python_part("brief", tmp_path, "")], data, Record()), lambda: True)


async def test_what_a_part_leaves_behind_dies_with_it(tmp_path: Path, data: DataFolder) -> None:
    process = await GuardedProcess.start(python_part("family", tmp_path, FAMILY), data)
    family = descendants(await _guard_of("family", tmp_path))
    assert len(family) == FAMILY_SIZE
    os.kill(pid_of("family", tmp_path), signal.SIGKILL)
    assert await process.wait() == 128 + signal.SIGKILL
    assert [pid for pid in family if alive(pid)] == []


async def test_a_killed_guard_takes_its_part_along(tmp_path: Path, data: DataFolder) -> None:
    process = await GuardedProcess.start(python_part("orphaned", tmp_path, ""), data)
    os.kill(await _guard_of("orphaned", tmp_path), signal.SIGKILL)
    await process.wait()
    part = pid_of("orphaned", tmp_path)
    await asyncio.to_thread(wait_until, lambda: not alive(part), "the part to die with its guard")


async def _guard_of(name: str, folder: Path) -> int:
    """The guard's pid, once its part is ready."""
    await asyncio.to_thread(wait_until, (folder / f"{name}.pid").exists, f"{name} to start")
    return int(Path(f"/proc/{pid_of(name, folder)}/stat").read_text().rpartition(")")[2].split()[1])


SUPERVISE = textwrap.dedent("""
    import asyncio, pathlib, sys
    from server.supervisor.data_folder import DataFolder
    from server.supervisor.supervisor import Supervisor
    from tests.unit.supervisor.conftest import FAMILY, Record, python_part

    folder = pathlib.Path(sys.argv[1])
    supervisor = Supervisor([python_part("family", folder, FAMILY)], DataFolder.open(folder / "data"), Record())
    started = lambda: print("started", flush=True)
    asyncio.run(supervisor.run(asyncio.Event(), asyncio.Event(), started))
""")


def test_a_killed_supervisor_leaves_no_process_and_frees_its_data_folder_once_they_are_gone(tmp_path: Path) -> None:
    background = Background([sys.executable, "-c", SUPERVISE, str(tmp_path)])
    background.wait_for("^started$")
    family = descendants(background.process.pid)
    assert len(family) == FAMILY_SIZE + 1
    background.process.kill()
    background.process.wait()
    DataFolder.open(tmp_path / "data").close()  # waits for the guards, which hold the lock
    assert [pid for pid in family if alive(pid)] == []
