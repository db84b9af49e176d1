"""The supervisor of `mta up`, on trivial parts: order, restarts, stopping."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from bench.rig.processes import PATIENCE_S, alive
from server.settings import Settings
from server.supervisor.data_folder import DataFolder
from server.supervisor.parts import StartError
from server.supervisor.services import worker_part
from server.supervisor.status import State
from server.supervisor.supervisor import Backoff, Supervisor
from tests.unit.supervisor.conftest import SLEEP, Record, pid_of, python_part, run_until, waits_for


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


async def test_a_part_may_stand_back_behind_the_others(tmp_path: Path, data: DataFolder) -> None:
    usual = os.getpriority(os.PRIO_PROCESS, 0)
    found: dict[str, int] = {}
    grouped: dict[str, int] = {}

    def looked() -> bool:
        for name in ("first", "back"):
            pid = pid_of(name, tmp_path)
            found[name] = os.getpriority(os.PRIO_PROCESS, pid)
            group = Path(f"/proc/{pid}/autogroup")  # "/autogroup-123 nice 5", if the kernel groups by session
            if group.exists() and (said := group.read_text().split()):
                grouped[name] = int(said[-1])
        return True

    parts = [python_part("first", tmp_path, ""), python_part("back", tmp_path, "", niceness=5)]
    await run_until(Supervisor(parts, data, Record()), looked)
    assert found == {"first": usual, "back": min(usual + 5, 19)}
    assert grouped in ({}, {"first": 0, "back": 5})


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


async def test_a_spare_part_whose_first_start_fails_ends_nothing_and_is_started_again(
    tmp_path: Path, data: DataFolder
) -> None:
    record, mended = Record(), tmp_path / "mended"
    code = f"import pathlib\nif not pathlib.Path({str(mended)!r}).exists(): raise SystemExit('no room on the card')"
    parts = [python_part("steady", tmp_path, ""), replace(python_part("worker", tmp_path, code), spare=True)]

    def mended_and_back() -> bool:
        if record.count("worker", State.DOWN) > 1:
            mended.touch()
        return record.count("worker", State.READY) == 1

    await run_until(Supervisor(parts, data, record, Backoff(first_s=0.01)), mended_and_back)
    assert "no room on the card" in record.details[record.states.index(("worker", State.DOWN))]
    assert record.count("steady", State.STARTING) == 1


async def test_a_spare_part_that_never_starts_is_given_up_while_the_others_go_on(
    tmp_path: Path, data: DataFolder
) -> None:
    record = Record()
    never = replace(python_part("worker", tmp_path, "raise SystemExit('no room on the card')"), spare=True)
    supervisor = Supervisor([python_part("steady", tmp_path, ""), never], data, record, Backoff(first_s=0.01, most=3))
    await run_until(supervisor, lambda: record.count("worker", State.GIVEN_UP) == 1)
    assert "no room on the card" in record.details[record.states.index(("worker", State.GIVEN_UP))]
    assert record.count("worker", State.STARTING) == 3
    assert record.states.index(("steady", State.STOPPING)) > record.states.index(("worker", State.GIVEN_UP))


async def test_a_worker_on_the_engines_card_starts_once_the_engine_has_taken_its_share(
    tmp_path: Path, data: DataFolder
) -> None:
    record = Record()
    parts = [
        replace(python_part("valkey", tmp_path, ""), needs=()),
        replace(python_part("engine", tmp_path, ""), needs=()),
        replace(python_part("worker", tmp_path, ""), needs=worker_part(Settings(), tmp_path, ["engine"]).needs),
    ]
    await run_until(Supervisor(parts, data, record), lambda: record.count("worker", State.READY) == 1)
    assert record.states.index(("worker", State.STARTING)) > record.states.index(("engine", State.READY))


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
