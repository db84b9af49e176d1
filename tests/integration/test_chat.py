"""`mta chat` in a real terminal, over a real gateway and a fake engine."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import typer

from bench.rig.processes import PATIENCE_S, mta, wait_until
from mta_client import Chunk, Client
from server.cli import _resend_signal
from server.cli.users.chat import chat
from server.supervisor.services import free_port
from tests.support.fake_engine import WORDS, FakeEngine
from tests.support.gateway import GatewayThread
from tests.support.terminal import CTRL_C, CTRL_D, Terminal, terminal

FIRST = r"first token after \d+ ms"
SHOWN_S = 0.5  # once text shows, Python's line editor looks for signals again; just before that, it waits for a key
Talk = Callable[..., str]


@pytest.fixture
def talk(gateway: GatewayThread, ada: str) -> Iterator[Terminal]:
    with terminal(mta("chat", "--user", ada, "--url", gateway.url, "--max-tokens", "4")) as screen:
        screen.wait_for(f"{ada}> ")
        yield screen


def answered(level: str) -> tuple[str, str]:
    """What shows of an answer of four tokens."""
    return f"{level}.*, {FIRST}, 4 tokens", "> "


def test_chat_asks_both_sides_and_goes_on_after_an_error(talk: Terminal, fake_engine: FakeEngine) -> None:
    talk.type("hello\n", *answered("merged"))
    talk.type("/base\n", "base> ")
    talk.type("and you?\n", *answered("base"))
    hello, answer, question = fake_engine.seen[-1].body["messages"]
    assert (hello["content"], question["content"]) == ("hello", "and you?")
    assert answer["role"] == "assistant"
    assert answer["content"]
    talk.type("/me\n", "user-.*> ")
    talk.type("/new\n", "> ")
    fake_engine.knobs.status = 500
    talk.type("hello\n", "error: ", "> ")
    fake_engine.knobs.status = None
    talk.type("hello\n", *answered("merged"))
    assert fake_engine.seen[-3].body["model"] == "base"
    assert len(fake_engine.seen[-1].body["messages"]) == 1
    talk.type("/strength 0\n", " 0> ")
    talk.type("hello\n", *answered("merged"))
    assert fake_engine.seen[-1].body["model"].endswith(":c")
    talk.type("/strength 0.42\n", "0.42> ")
    talk.type("hello\n", "error: strength must be a multiple of 0.05")
    talk.type("/strength much\n", "/strength much is none of:(?s:.)*/quit +quit")
    talk.type("/quit\n")
    assert talk.process.wait(PATIENCE_S) == 0


def test_ctrl_c_stops_an_answer_and_not_the_program(talk: Terminal, fake_engine: FakeEngine) -> None:
    fake_engine.knobs.hold_after = 1
    talk.type("hello\n", f"({'|'.join(WORDS)}) ")
    talk.type(CTRL_C, f"merged, {FIRST}, stopped")
    wait_until(lambda: fake_engine.seen[-1].aborted, "the engine to be told")
    talk.wait_for("> ")
    fake_engine.knobs.hold_after = None
    fake_engine.knobs.admit_s = 600
    talk.type("hello\n")
    wait_until(lambda: not fake_engine.seen[-1].aborted, "the engine to be asked")
    talk.type(CTRL_C, "no token, stopped")
    wait_until(lambda: fake_engine.seen[-1].aborted, "the engine to be told")
    talk.wait_for("> ")
    fake_engine.knobs.admit_s = 0
    talk.type("half a question", "half a question")
    time.sleep(SHOWN_S)
    talk.type(CTRL_C, "> ")
    talk.type("hello again\n", *answered("merged"))
    talk.type(CTRL_D)
    assert talk.process.wait(PATIENCE_S) == 0


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], gateway: GatewayThread) -> Talk:
    def chatting(user: str, *lines: str) -> str:
        left = iter((*lines, "/quit"))
        monkeypatch.setattr("builtins.input", lambda prompt: next(left))
        chat(user, gateway.url, 8)
        return capsys.readouterr().out

    return chatting


@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_interrupt_raised_in_a_finalizer_stops_the_answer(
    typed: Talk, ada: str, monkeypatch: pytest.MonkeyPatch, fake_engine: FakeEngine, pieces: int
) -> None:
    class Dying:  # somebody presses Ctrl-C as it is forgotten: what is raised at such a moment reaches nobody
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    said: list[str] = []
    echo = typer.echo

    def echoing(text: str = "", *, nl: bool = True) -> None:
        echo(text, nl=nl)
        if not nl:
            if len(said) == pieces:
                Dying()
            said.append(text)

    monkeypatch.setattr(typer, "echo", echoing)
    monkeypatch.setattr(sys, "unraisablehook", _resend_signal)  # as of every command
    fake_engine.knobs.token_delay_s = 0.1
    assert re.findall("stopped|[0-9]+ tokens", typed(ada, "hello", "hello again")) == ["stopped", "8 tokens"]


def test_an_answer_cannot_control_the_terminal(typed: Talk, ada: str, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = Chunk("red \x1b[31m\x9bor\x07\n\tnot", None, None, None, None)
    monkeypatch.setattr(Client, "stream", lambda self, *asked, **options: (one for one in [chunk]))
    assert "red [31mor\n\tnot\n" in typed(ada, "hello")


def test_a_gateway_that_is_not_there_is_one_line() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = subprocess.run(mta("chat", "--user", "ada", "--url", url), capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no gateway at {url}: ")
    assert "`mta up`" in done.stderr
    assert done.stderr.count("\n") == 1
