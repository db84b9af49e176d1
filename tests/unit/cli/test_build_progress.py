"""What a build shows of its progress, on a terminal and in a file."""

from __future__ import annotations

import re
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from adapters.training.trainer import StepReport
from server.cli.bank.progress import ConsoleProgress


class Shown(ConsoleProgress):
    """Progress whose time passes when a test says so."""

    def __init__(self, **console: Any) -> None:
        self.now_s, self.text = 100.0, StringIO()
        super().__init__(Console(file=self.text, width=120, **console), lambda: self.now_s)

    def pieces(self, *done: int, of: int, each_s: float) -> list[str]:
        """Show that these are done, a while after another; all lines so far."""
        for number in done:
            self.now_s += each_s
            self.piece("measuring", number, of)
        return self.text.getvalue().splitlines()


@pytest.mark.parametrize("terminal", [True, False])
def test_rows_then_pieces_of_other_work_then_another_row_are_all_shown(terminal: bool) -> None:
    with Shown(force_terminal=terminal) as progress:
        progress.begin({"common": 10})
        progress.step("common", 1, StepReport(1, 2.5, 10))
        progress.pieces(1, 2, 3, of=3, each_s=0)
        progress.begin({"task": 10})
        progress.step("task", 1, StepReport(1, 1.5, 10))
    for said in ("training common (1 of 1)", "measuring: 3 of 3", "training task (1 of 1)"):
        assert said in progress.text.getvalue()


@pytest.mark.parametrize("begun", [0, 2])
def test_the_time_left_of_pieces_is_that_of_those_to_be_made_at_the_pace_of_those_made(begun: int) -> None:
    with Shown() as progress:  # pieces that an earlier run made took no time in this one
        lines = progress.pieces(*range(begun, begun + 6), of=32, each_s=6)
    left_s = 6 * (32 - begun - 5)
    assert lines[-1] == f"measuring: {begun + 5} of 32  about {left_s // 60}:{left_s % 60:02d} min left"


def test_on_a_terminal_a_bar_begins_empty_and_shows_the_time_left() -> None:
    with Shown(force_terminal=True, color_system=None) as progress:
        progress.piece("measuring", 0, 8)
        assert "measuring: 0 of 8" in progress.text.getvalue()
        assert "━" not in progress.text.getvalue()
        progress.pieces(1, 2, of=8, each_s=30)
    # a quarter of 40
    assert re.search("━{10} +measuring: 2 of 8  about 3:00 min left", progress.text.getvalue())


def test_without_a_terminal_lines_are_some_seconds_apart_and_the_last_is_always_there() -> None:
    with Shown() as progress:
        lines = progress.pieces(*range(13), of=12, each_s=2)
    assert [line.split("  ")[0] for line in lines] == [f"measuring: {done} of 12" for done in (3, 6, 9, 12)]
