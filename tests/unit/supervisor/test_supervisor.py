"""What `mta up` supervises and how: its parts, order, restarts, stopping, logs, and that no process is left behind."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.rig.processes import PATIENCE_S, Background, alive, descendants, wait_until
from server.supervisor import supervisor
from server.supervisor.data_folder import DataFolder, StartError
from server.supervisor.services import Part
from server.supervisor.supervisor import Display, State, Supervisor, end, spawn

SLEEP, READY = "import time; time.sleep(600)", "up and ready"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
FAMILY = f"""
import subprocess, sys
# One child in our group, one in a session of its own, one that outlives its parent; none of them heeds SIGTERM.
stubborn = [sys.executable, "-c", {STUBBORN + "; " + SLEEP!r}]
subprocess.Popen(stubborn)
subprocess.Popen(stubborn, start_new_session=True)
orphan = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True)"
subprocess.run([sys.executable, "-c", orphan, stubborn[2]])
"""
FAMILY_SIZE = 4  # the part and the three


class ClosedTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_closed_terminal_disturbs_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    display = Display()
    for stopped in (False, True):  # while all start, and later
        if stopped:
            display.close()
        monkeypatch.setattr(sys, "stdout", ClosedTerminal())
        display.report("gateway", "stopping", "")
        display.say("stopped")
    display.close()


class Record:
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


def python_part(name: str, folder: Path, code: str, **changes: float) -> Part:
    """A part that runs `code`, writes its pid to `<name>.pid`, and then says that it is ready."""
    pid_file = folder / f"{name}.pid"
    ends = f"draft = {str(pid_file)!r} + '.tmp'; open(draft, 'w').write(str(os.getpid())); os.rename(draft, draft[:-4])"
    command = (sys.executable, "-c", f"import os\n{code.strip()}\n{ends}\nprint({READY!r}, flush=True)\n{SLEEP}")
    return Part(name, command, dict(os.environ), "", READY, **changes)  # type: ignore[arg-type]


def pid_of(name: str, folder: Path) -> int:
    return int((folder / f"{name}.pid").read_text())


async def run_until(
    condition: Callable[[Record], bool],
    data: DataFolder,
    *parts: Part,
    stop_timeout_s: float = PATIENCE_S,
    hurry: bool = False,
    record: Record | None = None,
) -> Record:
    """Supervise the parts until all were tried and the condition holds; what was reported."""
    started, record = asyncio.Event(), record or Record()
    supervisor = Supervisor(parts, data, record, stop_timeout_s)
    running = asyncio.create_task(supervisor.run(started.set))
    async with asyncio.timeout(PATIENCE_S):
        while not running.done() and not (started.is_set() and condition(record)):
            await asyncio.sleep(0.02)
        for _ in range(0 if running.done() else 1 + hurry):
            signal.raise_signal(signal.SIGINT)  # as Ctrl-C does
        await running
    return record


def at_once(record: Record) -> bool:
    return True


CHATTER = """
import itertools, threading, time
def chatter():
    for number in itertools.count():
        os.write(1, f"{number} {'x' * 90}\\n".encode())  # one write: `print` without a buffer makes four
        time.sleep(0.001)
threading.Thread(target=chatter, daemon=True).start()
"""
LIMIT = 20_000
SUPERVISE = """
import asyncio, pathlib, sys
from server.supervisor.data_folder import DataFolder
from server.supervisor.supervisor import Supervisor
from tests.unit.supervisor.test_supervisor import FAMILY, Record, python_part

folder = pathlib.Path(sys.argv[1])
supervisor = Supervisor([python_part("family", folder, FAMILY)], DataFolder.open(folder / "data"), Record(), 10)
asyncio.run(supervisor.run(lambda: print("started", flush=True)))
"""


def brief(folder: Path, code: str = "") -> Part:
    """A part that ends by itself soon after it is ready."""
    part = python_part("brief", folder, code)
    return replace(part, command=(*part.command[:2], part.command[2].replace(SLEEP, "import time; time.sleep(0.3)")))


def after(name: str, folder: Path) -> str:
    """Code that waits until another part is ready."""
    return f"while not os.path.exists({str(folder / f'{name}.pid')!r}): pass\n"


async def test_parts_start_after_those_they_need_and_stop_in_reverse(tmp_path: Path, data: DataFolder) -> None:
    """As a worker does: after the engine whose card it shares; a store elsewhere is none of the parts."""
    engine = python_part("engine", tmp_path, after("quick", tmp_path))
    worker = replace(python_part("worker", tmp_path, ""), needs=("valkey", "engine"))
    record = await run_until(at_once, data, engine, python_part("quick", tmp_path, ""), worker)
    assert record.states.index(("engine", "ready")) < record.states.index(("worker", "starting"))
    assert sorted(name for name, seen in record.states if seen == "ready") == ["engine", "quick", "worker"]
    down = [(name, state) for name in ("worker", "quick", "engine") for state in ("stopping", "stopped")]
    assert record.states[-6:] == down
    assert not any(alive(pid_of(name, tmp_path)) for name in ("engine", "quick", "worker"))


async def test_a_part_may_stand_back_behind_the_others(tmp_path: Path, data: DataFolder) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    found: dict[str, tuple[int, str]] = {}

    def looked(_: Record) -> bool:
        for name in ("first", "back"):
            pid = pid_of(name, tmp_path)
            group = Path(f"/proc/{pid}/autogroup")  # "/autogroup-123 nice 5", if the kernel groups by session
            grouped = group.read_text().split()[-1:] if group.exists() else []
            found[name] = (os.getpriority(os.PRIO_PROCESS, pid), "".join(grouped))
        return True

    await run_until(looked, data, python_part("first", tmp_path, ""), python_part("back", tmp_path, "", niceness=5))
    assert found["first"] in ((usual, ""), (usual, "0"))
    assert found["back"] in ((min(usual + 5, 19), ""), (min(usual + 5, 19), "5"))


async def test_part_that_starts_too_slowly_fails_unless_optional(
    tmp_path: Path, data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness = tmp_path / "slow.started"

    def now_s() -> float:  # an hour has passed once the witness is there
        return time.monotonic() + (3600 if witness.exists() and witness.stat().st_size else 0)

    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=now_s))
    code = f"with open({str(witness)!r}, 'a') as file: print(os.getpid(), file=file)\n{SLEEP}"
    slow = python_part("slow", tmp_path, code, start_timeout_s=600)
    with pytest.raises(StartError, match="slow was not ready after 600 s"):
        await run_until(at_once, data, slow)
    assert not alive(int(witness.read_text()))
    witness.unlink()

    def started_again(record: Record) -> bool:
        return record.count("slow", "starting") == 2 and not alive(int(witness.read_text().split()[0]))

    record = await run_until(started_again, data, replace(slow, optional=True))
    assert "was not ready after 600 s" in record.of("slow", "down")[0]


@pytest.mark.parametrize(
    ("forgiven_s", "delays"), [(0.0, ["0.01", "0.01", "0.01", "0.01"]), (600.0, ["0.01", "0.02", "0.04", "0.05"])]
)
async def test_restart_delay_doubles_to_its_limit_unless_stable(
    tmp_path: Path, data: DataFolder, monkeypatch: pytest.MonkeyPatch, forgiven_s: float, delays: list[str]
) -> None:
    monkeypatch.setattr(supervisor, "STABLE_AFTER_S", forgiven_s)
    monkeypatch.setattr(supervisor, "MAX_RESTART_DELAY_S", 0.05)
    record = await run_until(lambda record: record.count("brief", "down") == 4, data, brief(tmp_path))
    assert [detail.rpartition(" in ")[2] for detail in record.of("brief", "down")] == [f"{d} s" for d in delays]


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("optional", [True, False])
async def test_part_that_keeps_dying_is_given_up_or_ends_the_run(
    tmp_path: Path, data: DataFolder, monkeypatch: pytest.MonkeyPatch, *, optional: bool, starts: bool
) -> None:
    monkeypatch.setattr(supervisor, "MAX_DEATHS", 3)
    if not starts:  # however long it has tried, it was never up
        monkeypatch.setattr(supervisor, "STABLE_AFTER_S", 0.0)
    record = Record()
    code = "print('no room on the card', flush=True)" if starts else "raise SystemExit('no room on the card')"
    failing = brief(tmp_path, after("steady", tmp_path) + code)
    parts = python_part("steady", tmp_path, ""), replace(failing, optional=optional)
    running = run_until(lambda record: record.count("brief", "given up") == 1, data, *parts, record=record)
    if optional:
        await running
        assert "no room on the card" in record.of("brief", "given up")[0]
        assert ("no room on the card" in record.of("brief", "down")[0]) is not starts
        assert record.states.index(("steady", "stopping")) > record.states.index(("brief", "given up"))
    else:
        ended = "status 0 .* 3 times in a row" if starts else "status 1 before it was ready"
        with pytest.raises(StartError, match=rf"brief ended with {ended}(.*\n)*no room on the card"):
            await running
    assert record.count("brief", "starting") == (3 if optional or starts else 1)
    assert not alive(pid_of("steady", tmp_path))


async def test_a_part_that_fails_once_to_start_again_ends_nothing(tmp_path: Path, data: DataFolder) -> None:
    starts = tmp_path / "starts"
    code = f"""
with open({str(starts)!r}, "a") as file: file.write("x")
if open({str(starts)!r}).read() == "xx": raise SystemExit("not now")
"""
    parts = python_part("steady", tmp_path, ""), brief(tmp_path, code)
    record = await run_until(lambda record: record.count("brief", "ready") == 2, data, *parts)
    assert any("not now" in detail for detail in record.of("brief", "down"))
    assert record.count("steady", "starting") == 1


async def test_failed_restart_of_a_part_is_tried_again(
    tmp_path: Path, data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn, tried = supervisor.spawn, list[str]()

    async def spawned(part: Part, *given: Any) -> Any:
        tried.append(part.name)
        if tried == ["brief", "brief"]:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return await spawn(part, *given)

    monkeypatch.setattr(supervisor, "spawn", spawned)
    record = await run_until(lambda record: record.count("brief", "ready") == 2, data, brief(tmp_path))
    assert any("could not be started" in detail for detail in record.of("brief", "down"))


@pytest.mark.parametrize(("patience_s", "hurry"), [(0.1, False), (10 * PATIENCE_S, True)])
async def test_stubborn_part_is_killed_at_timeout_or_second_signal(
    tmp_path: Path, data: DataFolder, *, patience_s: float, hurry: bool
) -> None:
    part = python_part("stubborn", tmp_path, STUBBORN)
    async with asyncio.timeout(PATIENCE_S):
        await run_until(at_once, data, part, stop_timeout_s=patience_s, hurry=hurry)
    assert not alive(pid_of("stubborn", tmp_path))


async def test_a_hangup_that_nohup_ignores_stops_nothing(tmp_path: Path, data: DataFolder) -> None:
    stopping: list[int] = []

    def hung_up(record: Record) -> bool:
        stopping.append(record.count("brief", "stopping"))
        signal.raise_signal(signal.SIGHUP)
        return len(stopping) == 3

    usual = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        await run_until(hung_up, data, python_part("brief", tmp_path, ""))
    finally:
        signal.signal(signal.SIGHUP, usual)
    assert stopping == [0, 0, 0]


async def test_log_of_a_long_running_part_stays_small_and_recent(
    tmp_path: Path, data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.supervisor.data_folder.MAX_LOG_BYTES", LIMIT)
    monkeypatch.setattr("server.supervisor.supervisor.LOG_CHECK_INTERVAL_S", 0.05)
    log, rotated = data.log("chatty"), list[str]()
    before = log.with_suffix(".log.1")

    def three_times(_: Record) -> bool:
        if before.exists() and before.stat().st_size and (start := before.read_text()[:100]) not in rotated:
            rotated.append(start)
        return len(rotated) == 3

    await run_until(three_times, data, python_part("chatty", tmp_path, CHATTER))
    assert log.stat().st_size + before.stat().st_size < 10 * LIMIT
    # The part was killed, perhaps while it wrote the last line, perhaps as its log had just been begun anew.
    *lines, _ = (before.read_text() + log.read_text()).split("\n")
    numbers = [int(line.split()[0]) for line in lines]
    assert numbers == sorted(set(numbers))
    assert {len(line.split()[1]) for line in lines} == {90}  # no line is cut, none is full of holes
    assert numbers[0] > 3 * LIMIT // 200


async def test_part_held_up_for_its_operator_waits_and_says_so_once(tmp_path: Path, data: DataFolder) -> None:
    asked: list[str] = []

    async def held_up() -> str:
        asked.append("run this")
        return "" if len(asked) > 5 else asked[-1]

    part = replace(python_part("held", tmp_path, ""), ready="", held_up=held_up, start_timeout_s=0)
    other = replace(python_part("other", tmp_path, ""), needs=("held",))
    record = await run_until(at_once, data, part, other)
    assert record.of("held", "starting")[1:] == ["run this"]
    assert record.states.index(("held", "ready")) < record.states.index(("other", "starting"))


async def test_each_run_has_its_own_log_and_is_ready_when_it_says_so(tmp_path: Path, data: DataFolder) -> None:
    log = data.log("brief")
    for said, expected in (("ready: now", True), ("not yet", False)):
        part = replace(python_part("brief", tmp_path, f"print({said!r}, flush=True)"), ready="ready: now")
        process = await spawn(part, data, PATIENCE_S)
        try:
            await _guard_of("brief", tmp_path)  # by then it has said what it has to say
            assert await part.is_ready(log) is expected
            assert log.read_text().splitlines()[0] == said
        finally:
            await end(process, PATIENCE_S)
            (tmp_path / "brief.pid").unlink()
    before = log.with_suffix(".log.1")
    assert before.read_text().startswith("ready: now\n")
    before.unlink()
    before.mkdir()  # as on a full disk, there can be no new log
    await run_until(at_once, data, python_part("brief", tmp_path, ""))


async def test_children_die_with_their_part_and_it_with_its_guard(tmp_path: Path, data: DataFolder) -> None:
    process = await spawn(python_part("family", tmp_path, FAMILY), data, PATIENCE_S)
    family = descendants(await _guard_of("family", tmp_path))
    assert len(family) == FAMILY_SIZE
    os.kill(pid_of("family", tmp_path), signal.SIGKILL)
    assert await process.wait() == 128 + signal.SIGKILL
    assert [pid for pid in family if alive(pid)] == []
    orphans = list[int]()

    def guard_was_killed(record: Record) -> bool:
        if not orphans and record.count("orphaned", "ready"):
            guard = int(Path(f"/proc/{pid_of('orphaned', tmp_path)}/stat").read_text().rpartition(")")[2].split()[1])
            orphans.extend(descendants(guard)[:2])
            os.kill(guard, signal.SIGKILL)
        return record.count("orphaned", "ready") > 1

    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {SLEEP!r}])"
    await run_until(guard_was_killed, data, python_part("orphaned", tmp_path, code))
    assert len(orphans) == 2
    wait_until(lambda: not any(map(alive, orphans)), "the part and its child to die with their guard")


async def _guard_of(name: str, folder: Path) -> int:
    """The guard's pid, once its part is ready."""
    await asyncio.to_thread(wait_until, (folder / f"{name}.pid").exists, f"{name} to start")
    return int(Path(f"/proc/{pid_of(name, folder)}/stat").read_text().rpartition(")")[2].split()[1])


def test_killed_supervisor_leaves_no_process_and_frees_folder(tmp_path: Path) -> None:
    background = Background([sys.executable, "-c", SUPERVISE, str(tmp_path)])
    background.wait_for("^started$")
    family = descendants(background.process.pid)
    assert len(family) == FAMILY_SIZE + 1
    background.process.kill()
    background.process.wait()
    DataFolder.open(tmp_path / "data").close()  # waits for the guards, which hold the lock
    assert [pid for pid in family if alive(pid)] == []
