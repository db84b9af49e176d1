"""The demo as a person sees it; tests of files beside this one run here too, in order, with one server and browser."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from bench.rig.processes import alive, descendants, running, wait_until
from tests.e2e.answers import TestAnswers, TestTools  # noqa: F401
from tests.e2e.conftest import DEMO, PATIENCE_S, ROOT, Demo
from tests.e2e.everywhere import TestEverywhere, TestReading, TestTrouble  # noqa: F401
from tests.e2e.pages import TestAdapt, TestBank, TestSystem, TestUsers  # noqa: F401
from tests.e2e.playground import TestDrafts, TestPlayground, TestStrength  # noqa: F401
from tests.support.terminal import CTRL_C

pytestmark = pytest.mark.timeout(2700)  # the first test may have to build the bank


def test_on_a_terminal_the_server_stays_up_until_ctrl_c(demo: Demo) -> None:
    family = descendants(demo.pid)
    demo.terminal.type(CTRL_C)
    assert demo.terminal.process.wait(PATIENCE_S) == 0
    assert len(family) > 4
    assert not any(map(alive, family))


def test_without_a_terminal_a_killed_demo_leaves_no_process(tmp_path: Path) -> None:
    with running([*DEMO, str(tmp_path / "data")], cwd=ROOT) as demo:
        demo.wait_for(r"already holds this bank", PATIENCE_S)
        demo.wait_for(r"engine +starting", PATIENCE_S)  # the hardest to end
        family = descendants(demo.process.pid)
        demo.send(signal.SIGKILL)
        wait_until(lambda: not any(map(alive, family)), "the end of everything that the demo started")
