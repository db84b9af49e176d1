"""The supervisor of `mta up`, on trivial parts: order, restarts, stopping, and that nothing is ever left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.rig.processes import PATIENCE_S, Background, alive, descendants, wait_until
from server.supervisor.data_folder import DataFolder
from server.supervisor.errors import StartError
from server.supervisor.guarded import GuardedProcess
from server.supervisor.part import Backoff, Part
from server.supervisor.probes import writes
from server.supervisor.status import State
from server.supervisor.supervisor import Supervisor

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

    def __call__(self, part: str, state: State, detail: str = "") -> None:
        self.states.append((part, state))
        self.details.append(detail)

    def count(self, part: str, state: State) -> int:
        return self.states.count((part, state))


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataFolder]:
    folder = DataFolder.open(tmp_path / "data")
    yield folder
    folder.close()


def python_part(name: str, folder: Path, code: str, **changes: float) -> Part:
    """A part that runs `code`, and is ready once it has written its pid to `<name>.pid`."""
    pid_file = folder / f"{name}.pid"
    prelude = (
        f"import os, pathlib; draft = pathlib.Path({str(pid_file)!r} + '.tmp'); draft.write_text(str(os.getpid()))\n"
        f"draft.replace({str(pid_file)!r})\n"  # whoever reads it finds a whole pid
    )

    async def ready() -> bool:
        return pid_file.exists()

    times = {"start_timeout_s": PATIENCE_S, "stop_timeout_s": PATIENCE_S} | changes
    return Part(
        name, (sys.executable, "-c", code.strip() + "\n" + prelude + SLEEP), dict(os.environ), ready, "", **times
    )


def waits_for(path: Path, part: Part) -> Part:
    """The part, as one that does nothing before `path` exists."""
    wait = f"import pathlib, time\nwhile not pathlib.Path({str(path)!r}).exists(): time.sleep(0.01)\n"
    return replace(part, command=(*part.command[:2], wait + part.command[2]))


def pid_of(name: str, folder: Path) -> int:
    return int((folder / f"{name}.pid").read_text())


async def run_until(supervisor: Supervisor, condition: Callable[[], bool], *, hurry: bool = False) -> None:
    """Run the supervisor, and stop it when the condition holds."""
    stop, hurried, started = asyncio.Event(), asyncio.Event(), asyncio.Event()
    running = asyncio.create_task(supervisor.run(stop, hurried, started.set))
    async with asyncio.timeout(PATIENCE_S):
        while not running.done() and not (started.is_set() and condition()):
            await asyncio.sleep(0.02)
        stop.set()
        if hurry:
            hurried.set()
        await running


async def test_parts_start_in_order_and_stop_in_reverse(tmp_path: Path, data: DataFolder) -> None:
    record = Record()
    parts = [python_part(name, tmp_path, "") for name in ("first", "second")]
    await run_until(Supervisor(parts, data, record), lambda: True)
    assert record.states == [
        ("first", State.STARTING),
        ("first", State.READY),
        ("second", State.STARTING),
        ("second", State.READY),
        ("second", State.STOPPING),
        ("second", State.STOPPED),
        ("first", State.STOPPING),
        ("first", State.STOPPED),
    ]
    assert not alive(pid_of("first", tmp_path)) and not alive(pid_of("second", tmp_path))


async def test_a_part_that_needs_no_other_starts_beside_them_and_all_are_awaited(
    tmp_path: Path, data: DataFolder
) -> None:
    record = Record()
    slow = waits_for(tmp_path / "quick.pid", python_part("slow", tmp_path, ""))
    quick, last = (
        replace(python_part(name, tmp_path, ""), needs=needs) for name, needs in (("quick", ()), ("last", ("slow",)))
    )
    await run_until(Supervisor([slow, quick, last], data, record), lambda: True)
    states = [change for change in record.states if change[1] in (State.STARTING, State.READY)]
    assert states.index(("slow", State.READY)) < states.index(("last", State.STARTING))
    assert sorted(name for name, state in states if state is State.READY) == ["last", "quick", "slow"]
    stopped = [name for name, state in record.states if state is State.STOPPED]
    assert stopped == ["last", "quick", "slow"]


async def test_a_part_starts_when_another_is_far_enough(tmp_path: Path, data: DataFolder) -> None:
    record, gate = Record(), tmp_path / "gate"
    early = python_part("early", tmp_path, f"open({str(gate)!r}, 'w')")
    seen: list[bool] = []

    async def far_enough() -> bool:
        seen.append(gate.exists())
        return seen[-1]

    late = replace(python_part("late", tmp_path, ""), needs=(), start_when=far_enough)
    await run_until(Supervisor([early, late], data, record), lambda: True)
    assert seen[-1] and not seen[0]
    assert record.count("late", State.READY) == 1


async def test_a_part_that_fails_to_start_ends_those_beside_it(tmp_path: Path, data: DataFolder) -> None:
    beside = replace(python_part("beside", tmp_path, ""), needs=())
    broken = waits_for(tmp_path / "beside.pid", python_part("broken", tmp_path, "raise SystemExit('no such bank')"))
    with pytest.raises(StartError, match="broken ended with status 1"):
        await run_until(Supervisor([broken, beside], data, Record()), lambda: False)
    assert not alive(pid_of("beside", tmp_path))


async def test_a_part_that_is_killed_is_started_again_and_the_others_are_left_alone(
    tmp_path: Path, data: DataFolder
) -> None:
    record = Record()
    supervisor = Supervisor(
        [python_part(name, tmp_path, "") for name in ("steady", "frail")], data, record, Backoff(first_s=0.01)
    )
    killed: list[int] = []

    def twice() -> bool:
        pid = pid_of("frail", tmp_path)
        if len(killed) < 2 and pid not in killed and alive(pid):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return record.count("frail", State.READY) == 3

    await run_until(supervisor, twice)
    assert record.count("steady", State.STARTING) == 1
    assert any(f"status {128 + signal.SIGKILL}" in detail for detail in record.details)


def test_the_wait_before_a_restart_doubles_up_to_its_limit() -> None:
    backoff = Backoff(first_s=0.5, limit_s=30)
    assert [backoff.delay_s(deaths) for deaths in (1, 2, 3, 7, 1000)] == [0.5, 1, 2, 30, 30]


@pytest.mark.parametrize(("forgive_s", "delays"), [(0.0, ["0.01", "0.01", "0.01"]), (600.0, ["0.01", "0.02", "0.04"])])
async def test_a_part_that_stayed_up_long_enough_starts_again_with_the_shortest_wait(
    tmp_path: Path, data: DataFolder, forgive_s: float, delays: list[str]
) -> None:
    record = Record()
    part = python_part("brief", tmp_path, "")
    dying = replace(part, command=(*part.command[:2], part.command[2].replace(SLEEP, "import time; time.sleep(0.3)")))
    supervisor = Supervisor([dying], data, record, Backoff(first_s=0.01, forgive_s=forgive_s))
    await run_until(supervisor, lambda: record.count("brief", State.DOWN) == 3)
    seen = [d.rpartition(" in ")[2] for (_, s), d in zip(record.states, record.details, strict=True) if s is State.DOWN]
    assert seen == [f"{delay} s" for delay in delays]


@pytest.mark.parametrize("spare", [True, False])
async def test_a_part_that_dies_again_and_again_is_given_up_and_ends_the_others_only_if_they_need_it(
    tmp_path: Path, data: DataFolder, spare: bool
) -> None:
    record = Record()
    brief = python_part("brief", tmp_path, "print('no such device', flush=True)")
    dying = replace(
        brief,
        command=(*brief.command[:2], brief.command[2].replace(SLEEP, "import time; time.sleep(0.3)")),
        spare=spare,
    )
    supervisor = Supervisor(
        [python_part("steady", tmp_path, ""), dying], data, record, Backoff(first_s=0.01, limit_s=0.01, most=3)
    )
    running = run_until(supervisor, lambda: record.count("brief", State.GIVEN_UP) == 1)
    if spare:
        await running
        assert "no such device" in record.details[record.states.index(("brief", State.GIVEN_UP))]
        assert record.states.index(("steady", State.STOPPING)) > record.states.index(("brief", State.GIVEN_UP))
    else:
        with pytest.raises(StartError, match=r"brief ended with status 0 .* 3 times in a row(.*\n)*no such device"):
            await running
    assert record.count("brief", State.STARTING) == 3
    assert not alive(pid_of("steady", tmp_path))


async def test_a_part_that_ends_before_it_is_ready_fails_the_start_with_the_end_of_its_log(
    tmp_path: Path, data: DataFolder
) -> None:
    parts = [python_part("first", tmp_path, ""), python_part("broken", tmp_path, "raise SystemExit('no such bank')")]
    with pytest.raises(StartError, match=r"broken ended with status 1 .*\n(.*\n)*no such bank"):
        await run_until(Supervisor(parts, data, Record()), lambda: False)
    assert not alive(pid_of("first", tmp_path))


async def test_a_part_that_takes_too_long_fails_the_start_and_is_gone(tmp_path: Path, data: DataFolder) -> None:
    witness = tmp_path / "slow.started"
    code = f"import os, pathlib; pathlib.Path({str(witness)!r}).write_text(str(os.getpid())); {SLEEP}"
    with pytest.raises(StartError, match="slow was not ready after 2 s"):
        await run_until(Supervisor([python_part("slow", tmp_path, code, start_timeout_s=2)], data, Record()), bool)
    assert not alive(int(witness.read_text()))


async def test_a_part_that_ignores_the_request_to_stop_is_killed(tmp_path: Path, data: DataFolder) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    part = python_part("stubborn", tmp_path, stubborn, stop_timeout_s=0.1)
    await run_until(Supervisor([part], data, Record()), lambda: True)
    assert not alive(pid_of("stubborn", tmp_path))


async def test_a_second_signal_ends_the_wait_for_a_stubborn_part(tmp_path: Path, data: DataFolder) -> None:
    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    part = python_part("stubborn", tmp_path, stubborn, stop_timeout_s=10 * PATIENCE_S)
    await run_until(Supervisor([part], data, Record()), lambda: True, hurry=True)
    assert not alive(pid_of("stubborn", tmp_path))


CHATTER = """
import itertools, threading, time
def chatter():
    for number in itertools.count():
        print(number, "x" * 90, flush=True)
        time.sleep(0.001)
threading.Thread(target=chatter, daemon=True).start()
"""
LIMIT = 20_000


@pytest.fixture
def small_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.supervisor.data_folder.MAX_LOG_BYTES", LIMIT)
    monkeypatch.setattr("server.supervisor.supervisor.LOG_LOOK_S", 0.05)


@pytest.mark.usefixtures("small_logs")
async def test_the_log_of_a_part_that_runs_for_long_stays_small_and_keeps_the_newest(
    tmp_path: Path, data: DataFolder
) -> None:
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
    *whole, _ = (before.read_text() + log.read_text()).split("\n")
    lines = [line for line in whole if "====" not in line]
    numbers = [int(line.split()[0]) for line in lines]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert {len(line.split()[1]) for line in lines} == {90}  # no line is cut, none is full of holes
    assert numbers[0] > 3 * LIMIT // 200


@pytest.mark.usefixtures("small_logs")
async def test_a_part_that_says_when_it_is_ready_is_found_ready_again_after_its_log_was_emptied(
    tmp_path: Path, data: DataFolder
) -> None:
    log, record = data.log("chatty"), Record()
    part = replace(python_part("chatty", tmp_path, f"print('ready: now')\n{CHATTER}"), ready=writes(log, "ready: now"))
    killed: list[int] = []

    def emptied_and_back() -> bool:
        if not killed and log.with_suffix(".log.1").exists():
            killed.append(pid_of("chatty", tmp_path))
            os.kill(killed[0], signal.SIGKILL)
        return record.count("chatty", State.READY) == 2

    await run_until(Supervisor([part], data, record, Backoff(first_s=0.01)), emptied_and_back)


async def test_a_part_that_was_ready_before_is_not_until_it_says_so_again(tmp_path: Path, data: DataFolder) -> None:
    log = data.log("brief")
    for code, expected in (("print('ready: now', flush=True)", True), ("print('not yet', flush=True)", False)):
        part = replace(python_part("brief", tmp_path, code), ready=writes(log, "ready: now"))
        process = await GuardedProcess.start(part, log)
        try:
            await _guard_of("brief", tmp_path)  # by then it has said what it has to say
            assert await part.ready() is expected
            assert process.log_tail() == code.split("'")[1]
        finally:
            await process.kill()
            (tmp_path / "brief.pid").unlink()


async def test_what_a_part_leaves_behind_dies_with_it(tmp_path: Path, data: DataFolder) -> None:
    process = await GuardedProcess.start(python_part("family", tmp_path, FAMILY), tmp_path / "family.log")
    guard = await _guard_of("family", tmp_path)
    family = descendants(guard)
    assert len(family) == FAMILY_SIZE
    os.kill(pid_of("family", tmp_path), signal.SIGKILL)
    assert await process.wait() == 128 + signal.SIGKILL
    assert [pid for pid in family if alive(pid)] == []


async def test_a_killed_guard_takes_its_part_along(tmp_path: Path, data: DataFolder) -> None:
    process = await GuardedProcess.start(python_part("orphaned", tmp_path, ""), tmp_path / "orphaned.log")
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
    from tests.unit.supervisor.test_supervisor import FAMILY, Record, python_part

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
