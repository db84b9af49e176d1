"""What a build shows of its progress, on a terminal and in a file."""

from __future__ import annotations

import re
from io import StringIO

import pytest
from rich.console import Console

from adapters.training.trainer import StepReport
from server.cli.bank.progress import ConsoleProgress


class Clock:
    """Time that passes when a test says so."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize("terminal", [True, False])
def test_rows_then_pieces_of_other_work_then_another_row_are_all_shown(terminal: bool) -> None:
    written = StringIO()
    console = Console(file=written, force_terminal=terminal, width=120)
    with ConsoleProgress(console) as progress:
        progress.begin({"common": 10})
        progress.step("common", 1, StepReport(1, 2.5, 10))
        for done in (1, 2, 3):
            progress.piece("measuring", done, 3)
        progress.begin({"task": 10})
        progress.step("task", 1, StepReport(1, 1.5, 10))
    shown = written.getvalue()
    assert "training common (1 of 1)" in shown
    assert "measuring: 3 of 3" in shown
    assert "training task (1 of 1)" in shown


@pytest.mark.parametrize("begun", [0, 2])
def test_the_time_left_of_pieces_is_that_of_those_to_be_made_at_the_pace_of_those_made(begun: int) -> None:
    """Pieces that an earlier run made took no time in this one."""
    written, clock = StringIO(), Clock()
    with ConsoleProgress(Console(file=written, width=120), clock) as progress:
        progress.piece("measuring", begun, 32)
        for done in range(begun + 1, begun + 6):
            clock.now_s += 6
            progress.piece("measuring", done, 32)
    left_s = 6 * (32 - begun - 5)
    last = written.getvalue().splitlines()[-1]
    assert last == f"measuring: {begun + 5} of 32  about {left_s // 60}:{left_s % 60:02d} min left"


def test_on_a_terminal_a_bar_begins_empty_and_shows_the_time_left() -> None:
    written, clock = StringIO(), Clock()
    console = Console(file=written, force_terminal=True, color_system=None, width=120)
    with ConsoleProgress(console, clock) as progress:
        progress.piece("measuring", 0, 8)
        assert "measuring: 0 of 8" in written.getvalue()
        assert "━" not in written.getvalue()
        for done in (1, 2):
            clock.now_s += 30
            progress.piece("measuring", done, 8)
    assert re.search("━{10} +measuring: 2 of 8  about 3:00 min left", written.getvalue())  # a quarter of 40


def test_without_a_terminal_lines_are_some_seconds_apart_and_the_last_is_always_there() -> None:
    written, clock = StringIO(), Clock()
    with ConsoleProgress(Console(file=written, width=120), clock) as progress:
        progress.piece("measuring", 0, 12)
        for done in range(1, 13):
            clock.now_s += 2
            progress.piece("measuring", done, 12)
    lines = written.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == [f"measuring: {done} of 12" for done in (3, 6, 9, 12)]


def test_the_estimate_follows_the_machine_as_it_is_now() -> None:
    written, clock = StringIO(), Clock()
    with ConsoleProgress(Console(file=written, width=120), clock) as progress:
        progress.begin({"common": 100})
        for step in range(1, 71):
            clock.now_s += 1 if step <= 40 else 10
            progress.step("common", 100, StepReport(step, 2.5, 1))
    assert written.getvalue().splitlines()[-1].endswith("0 tokens/s  about 5:00 min left")
