"""What a build shows of its progress, on a terminal and in a file."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from adapters.training.trainer import StepReport
from server.cli.bank.progress import ConsoleProgress


@pytest.mark.parametrize("terminal", [True, False])
def test_rows_then_pieces_of_other_work_then_another_row_are_all_shown(terminal: bool) -> None:
    written = StringIO()
    console = Console(file=written, force_terminal=terminal, width=120)
    with ConsoleProgress(console) as progress:
        progress.begin({"common": 10})
        progress.step("common", 1, StepReport(1, 2.5, 10))
        for done in (1, 2, 3):
            progress.piece("calibrating", done, 3)
        progress.begin({"task": 10})
        progress.step("task", 1, StepReport(1, 1.5, 10))
    shown = written.getvalue()
    assert "training common (1 of 1)" in shown
    assert "calibrating: 3 of 3" in shown
    assert "training task (1 of 1)" in shown
