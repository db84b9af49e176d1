"""The supervisor of `mta up`, on trivial parts: order, restarts, stopping."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from bench.rig.processes import PATIENCE_S, alive
from server.settings import Settings
from server.supervisor import supervisor
from server.supervisor.data_folder import DataFolder, StartError
from server.supervisor.services import Part, worker_part
from server.supervisor.status import State
from server.supervisor.supervisor import Supervisor
from tests.unit.supervisor.conftest import SLEEP, Record, pid_of, python_part, run_until, waits_for

NO_BANK = "raise SystemExit('no such bank')"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def brief(folder: Path, code: str = "") -> Part:
    """A part that ends by itself, soon after it is ready."""
    part = python_part("brief", folder, code)
    return replace(part, command=(*part.command[:2], part.command[2].replace(SLEEP, "import time; time.sleep(0.3)")))


async def test_parts_start_once_those_they_need_are_ready_and_stop_in_reverse(tmp_path: Path, data: DataFolder) -> None:
    """As a worker does on an engine's card, after the engine has taken its share."""
    record = Record()
    parts = [
        waits_for(tmp_path / "quick.pid", python_part("engine", tmp_path, "")),
        python_part("quick", tmp_path, ""),
        replace(python_part("worker", tmp_path, ""), needs=worker_part(Settings(), tmp_path, ["engine"]).needs),
    ]
    await run_until(Supervisor(parts, data, record), lambda: True)
    assert record.states.index(("engine", State.READY)) < record.states.index(("worker", State.STARTING))
    assert sorted(name for name, seen in record.states if seen is State.READY) == ["engine", "quick", "worker"]
    down = [(name, state) for name in ("worker", "quick", "engine") for state in (State.STOPPING, State.STOPPED)]
    assert record.states[-6:] == down
    assert not any(alive(pid_of(part.name, tmp_path)) for part in parts)


async def test_a_part_starts_when_another_is_far_enough(tmp_path: Path, data: DataFolder) -> None:
    record, gate = Record(), tmp_path / "gate"
    early = python_part("early", tmp_path, f"open({str(gate)!r}, 'w')")

    async def far_enough() -> bool:
        return gate.exists()

    late = replace(python_part("late", tmp_path, f"assert open({str(gate)!r})"), start_when=far_enough)
    await run_until(Supervisor([early, late], data, record), lambda: True)
    assert record.count("late", State.READY) == 1


async def test_a_part_may_stand_back_behind_the_others(tmp_path: Path, data: DataFolder) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    found: dict[str, tuple[int, str]] = {}

    def looked() -> bool:
        for name in ("first", "back"):
            pid = pid_of(name, tmp_path)
            group = Path(f"/proc/{pid}/autogroup")  # "/autogroup-123 nice 5", if the kernel groups by session
            grouped = group.read_text().split()[-1:] if group.exists() else []
            found[name] = (os.getpriority(os.PRIO_PROCESS, pid), "".join(grouped))
        return True

    parts = [python_part("first", tmp_path, ""), python_part("back", tmp_path, "", niceness=5)]
    await run_until(Supervisor(parts, data, Record()), looked)
    assert found["first"] in ((usual, ""), (usual, "0"))
    assert found["back"] in ((min(usual + 5, 19), ""), (min(usual + 5, 19), "5"))


async def test_a_part_that_fails_to_start_ends_the_others_with_the_end_of_its_log(
    tmp_path: Path, data: DataFolder
) -> None:
    beside = python_part("beside", tmp_path, "")
    broken = waits_for(tmp_path / "beside.pid", python_part("broken", tmp_path, NO_BANK))
    with pytest.raises(StartError, match=r"broken ended with status 1 .*\n(.*\n)*no such bank"):
        await run_until(Supervisor([beside, broken], data, Record()), lambda: False)
    assert not alive(pid_of("beside", tmp_path))


async def test_a_part_that_takes_too_long_is_gone_and_fails_the_start_unless_it_is_spare(
    tmp_path: Path, data: DataFolder
) -> None:
    witness = tmp_path / "slow.started"
    code = f"import os\nwith open({str(witness)!r}, 'a') as file: print(os.getpid(), file=file)\n{SLEEP}"
    slow = python_part("slow", tmp_path, code, start_timeout_s=1)
    with pytest.raises(StartError, match="slow was not ready after 1 s"):
        await run_until(Supervisor([slow], data, Record()), bool)
    assert not alive(int(witness.read_text()))
    witness.unlink()
    record = Record()

    def started_again() -> bool:
        return record.count("slow", State.STARTING) == 2 and not alive(int(witness.read_text().split()[0]))

    await run_until(Supervisor([replace(slow, optional=True)], data, record), started_again)
    assert "was not ready after 1 s" in record.of("slow", State.DOWN)[0]


async def test_a_part_that_is_killed_is_started_again_and_the_others_are_left_alone(
    tmp_path: Path, data: DataFolder
) -> None:
    record, killed = Record(), list[int]()
    parts = [python_part(name, tmp_path, "") for name in ("steady", "frail")]

    def killed_and_back() -> bool:
        if not killed:
            killed.append(pid_of("frail", tmp_path))
            os.kill(killed[0], signal.SIGKILL)
        return record.count("frail", State.READY) == 2

    await run_until(Supervisor(parts, data, record), killed_and_back)
    assert record.count("steady", State.STARTING) == 1
    assert f"status {128 + signal.SIGKILL}" in record.of("frail", State.DOWN)[0]


@pytest.mark.parametrize(
    ("forgiven_s", "delays"), [(0.0, ["0.01", "0.01", "0.01", "0.01"]), (600.0, ["0.01", "0.02", "0.04", "0.05"])]
)
async def test_the_wait_before_a_restart_doubles_up_to_its_limit_unless_the_part_stayed_up_long_enough(
    tmp_path: Path, data: DataFolder, monkeypatch: pytest.MonkeyPatch, forgiven_s: float, delays: list[str]
) -> None:
    monkeypatch.setattr(supervisor, "STABLE_AFTER_S", forgiven_s)
    monkeypatch.setattr(supervisor, "MAX_RESTART_DELAY_S", 0.05)
    record = Record()
    await run_until(Supervisor([brief(tmp_path)], data, record), lambda: record.count("brief", State.DOWN) == 4)
    assert [detail.rpartition(" in ")[2] for detail in record.of("brief", State.DOWN)] == [f"{d} s" for d in delays]


@pytest.mark.parametrize("starts", [True, False])
@pytest.mark.parametrize("optional", [True, False])
async def test_a_part_that_dies_again_and_again_is_given_up_and_ends_the_others_only_if_they_need_it(
    tmp_path: Path, data: DataFolder, monkeypatch: pytest.MonkeyPatch, *, optional: bool, starts: bool
) -> None:
    monkeypatch.setattr(supervisor, "MAX_DEATHS", 3)
    if not starts:  # however long it has tried, it was never up
        monkeypatch.setattr(supervisor, "STABLE_AFTER_S", 0.0)
    record = Record()
    code = "print('no room on the card', flush=True)" if starts else "raise SystemExit('no room on the card')"
    parts = [python_part("steady", tmp_path, ""), replace(brief(tmp_path, code), optional=optional)]
    running = run_until(Supervisor(parts, data, record), lambda: record.count("brief", State.GIVEN_UP) == 1)
    if optional:
        await running
        assert "no room on the card" in record.of("brief", State.GIVEN_UP)[0]
        assert record.states.index(("steady", State.STOPPING)) > record.states.index(("brief", State.GIVEN_UP))
    else:
        ended = "status 0 .* 3 times in a row" if starts else "status 1 before it was ready"
        with pytest.raises(StartError, match=rf"brief ended with {ended}(.*\n)*no room on the card"):
            await running
    assert record.count("brief", State.STARTING) == (3 if optional or starts else 1)
    assert not alive(pid_of("steady", tmp_path))


async def test_a_part_that_fails_once_to_start_again_ends_nothing(tmp_path: Path, data: DataFolder) -> None:
    record, starts, pid_file = Record(), tmp_path / "starts", tmp_path / "brief.pid"
    code = f"""
import atexit, pathlib
atexit.register(pathlib.Path({str(pid_file)!r}).unlink, missing_ok=True)  # or it would be ready before it starts
with open({str(starts)!r}, "a") as file: file.write("x")
if open({str(starts)!r}).read() == "xx": raise SystemExit("not now")
"""
    parts = [python_part("steady", tmp_path, ""), brief(tmp_path, code)]
    await run_until(Supervisor(parts, data, record), lambda: record.count("brief", State.READY) == 2)
    assert any("not now" in detail for detail in record.of("brief", State.DOWN))
    assert record.count("steady", State.STARTING) == 1


async def test_a_spare_part_whose_first_start_fails_ends_nothing_and_is_started_again(
    tmp_path: Path, data: DataFolder
) -> None:
    record, mended = Record(), tmp_path / "mended"
    code = f"import pathlib\nif not pathlib.Path({str(mended)!r}).exists(): raise SystemExit('no room on the card')"
    parts = [python_part("steady", tmp_path, ""), replace(python_part("worker", tmp_path, code), optional=True)]

    def mended_and_back() -> bool:
        if record.count("worker", State.DOWN) > 1:
            mended.touch()
        return record.count("worker", State.READY) == 1

    await run_until(Supervisor(parts, data, record), mended_and_back)
    assert "no room on the card" in record.of("worker", State.DOWN)[0]
    assert record.count("steady", State.STARTING) == 1


@pytest.mark.parametrize(("patience_s", "hurry"), [(0.1, False), (10 * PATIENCE_S, True)])
async def test_a_stubborn_part_is_killed_when_its_time_is_up_or_a_second_signal_comes(
    tmp_path: Path, data: DataFolder, *, patience_s: float, hurry: bool
) -> None:
    part = python_part("stubborn", tmp_path, STUBBORN, stop_timeout_s=patience_s)
    async with asyncio.timeout(PATIENCE_S):
        await run_until(Supervisor([part], data, Record()), lambda: True, hurry=hurry)
    assert not alive(pid_of("stubborn", tmp_path))
