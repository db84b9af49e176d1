"""`python -m deploy.demo` as a person sees it: the table, the calls to try, and nothing left behind."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from bench.rig.processes import alive, descendants, running, wait_until
from deploy.demo.personas import PEOPLE
from tests.support.terminal import CTRL_C, terminal

DEMO = (sys.executable, "-m", "deploy.demo")
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600.0

pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("demo_bank")]


def _command(tmp_path: Path) -> list[str]:
    return [*DEMO, "--data", str(tmp_path / "data")]


def test_without_a_terminal_it_prints_the_table_and_stops_everything(tmp_path: Path) -> None:
    with running(_command(tmp_path), cwd=ROOT) as demo:
        demo.wait_for(r"already holds this bank", PATIENCE_S)
        demo.wait_for(r"\[4/6\]", PATIENCE_S)
        family = descendants(demo.process.pid)
        status = demo.wait(PATIENCE_S)
        assert status == 0, demo.output
        table = demo.output.partition("Asked by")[2]
        for shown in ("nobody", *(person.user_id for person in PEOPLE), "First token", " ms ", "a0"):
            assert shown in table
        assert "succeeded after" in table
        assert "before and after" in table
        assert family
        assert not any(map(alive, family))


def test_a_killed_demo_leaves_no_process(tmp_path: Path) -> None:
    with running(_command(tmp_path), cwd=ROOT) as demo:
        demo.wait_for(r"engine +starting", PATIENCE_S)  # the hardest to end
        family = descendants(demo.process.pid)
        demo.send(signal.SIGKILL)
        wait_until(lambda: not any(map(alive, family)), "the end of everything that the demo started")


def test_on_a_terminal_the_server_stays_up_until_ctrl_c(tmp_path: Path) -> None:
    with terminal(_command(tmp_path), ROOT) as demo:
        demo.wait_for("curl -s", PATIENCE_S)
        demo.wait_for("/console")
        demo.wait_for("Ctrl-C stops everything", PATIENCE_S)
        family = descendants(demo.process.pid)
        demo.type(CTRL_C)
        assert demo.process.wait(PATIENCE_S) == 0
        assert family
        assert not any(map(alive, family))
