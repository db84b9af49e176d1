"""`python -m deploy.demo` as a person sees it: the table, the calls to try, and nothing left behind."""

from __future__ import annotations

import os
import pty
import signal
import sys
import time
from pathlib import Path

import pytest

from bench.rig.processes import Background, alive, descendants, running, wait_until
from deploy.demo.personas import PEOPLE

DEMO = (sys.executable, "-m", "deploy.demo")
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 600.0

pytestmark = [pytest.mark.timeout(1200), pytest.mark.usefixtures("demo_bank")]


def _command(tmp_path: Path) -> list[str]:
    return [*DEMO, "--data", str(tmp_path / "data")]


def test_without_a_terminal_it_prints_the_table_and_stops_everything(tmp_path: Path) -> None:
    with running(_command(tmp_path), cwd=ROOT) as demo:
        demo.wait_for(r"holds this very bank already", PATIENCE_S)
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
        _wait_for_parts(demo)
        family = descendants(demo.process.pid)
        demo.send(signal.SIGKILL)
        wait_until(lambda: not any(map(alive, family)), "the end of everything that the demo started")


def test_on_a_terminal_the_server_stays_up_until_ctrl_c(tmp_path: Path) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, and so would its children
        os.chdir(ROOT)
        os.execv(sys.executable, _command(tmp_path))
    try:
        shown = _read_until(terminal, "Ctrl-C stops everything")
        assert "curl -s" in shown
        assert "/console" in shown.rpartition("curl -s")[2]
        family = descendants(pid)
        os.write(terminal, b"\x03")
        _read_until(terminal, None)
    except BaseException:
        os.kill(pid, signal.SIGTERM)
        raise
    finally:
        _, status = os.waitpid(pid, 0)
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0
    assert family
    assert not any(map(alive, family))


def _wait_for_parts(demo: Background) -> None:
    """Until `mta up` has started the engine, which is the hardest to end."""
    demo.wait_for(r"engine +starting", PATIENCE_S)


def _read_until(terminal: int, text: str | None) -> str:
    """What the terminal shows, up to `text` or, without one, the end."""
    shown = ""
    deadline_s = time.monotonic() + PATIENCE_S
    while text is None or text not in shown:
        assert time.monotonic() < deadline_s, shown
        try:
            chunk = os.read(terminal, 4096)
        except OSError:  # Linux's way of saying that the other side is closed
            chunk = b""
        if not chunk:
            assert text is None, shown
            break
        shown += chunk.decode("utf-8", "replace")
    return shown
