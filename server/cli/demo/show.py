"""The steps of the demo, from nothing to personalised answers in a table."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.text import Text

from mta_client import MtaError
from server.cli.demo import adapting
from server.cli.demo.answers import answers_table, ask, curl_lines
from server.cli.demo.bank import build_bank
from server.cli.demo.personas import NOBODY, PEOPLE, QUESTIONS, anchors
from server.cli.demo.server import DemoError, Server, run_mta, running_server
from server.watching.background import exit_on_signals

SHOWN_QUESTIONS = QUESTIONS[:2]
STEPS = 6
_PLAIN_WIDTH = 100
_EXCERPT_CHARS = 44


def show(data: Path) -> int:
    """Run the demo with its server's data in a folder, and return the exit status."""
    console = Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH, highlight=False)
    exit_on_signals()
    try:
        _run(console, data)
    except MtaError as error:
        raise DemoError(str(error)) from error
    except KeyboardInterrupt:
        console.print("\ndemo: interrupted; everything is stopped, and finished work is kept")
        return 128 + signal.SIGINT
    return 0


def _run(console: Console, data: Path) -> None:
    step, line, people = partial(_step, console), partial(_line, console), anchors()
    with step(1, "mta models: a base model and an embedder, made once"):
        run_mta("models")
    with step(2, f"mta bank build: {len(people)} made-up people become anchors, once"):
        bank = build_bank(people)
    with ExitStack() as stack:
        with step(3, "mta up: the server"):
            server = stack.enter_context(running_server(bank, data, line))
        with step(4, "Three people who are not anchors, each with a few lines of their writing"):
            for person in PEOPLE:
                server.api.forget(person.user_id, missing_ok=True)  # left by an earlier run
                server.api.put_profile(person.user_id, person.lines)
                start = " ".join(person.lines[0].split())[:_EXCERPT_CHARS]
                line(f"PUT /users/{person.user_id}/profile: {len(person.lines)} lines, “{start}…”")
        marks = {NOBODY: "no profile"} | {person.user_id: person.manner.mark for person in PEOPLE}
        with step(5, "POST /generate: the same questions, as nobody and as each of them"):
            ask(server.api, NOBODY, QUESTIONS[-1])  # warm up: the first request is slow
            asked = [(question, user_id) for question in SHOWN_QUESTIONS for user_id in marks]
            answers = {(question, user_id): ask(server.api, user_id, question) for question, user_id in asked}
        console.print(answers_table(SHOWN_QUESTIONS, answers, marks))
        with step(6, f"POST /users/{adapting.USER}/adapt: {adapting.SAMPLES} samples of a habit that no anchor has"):
            before = [answers[question, adapting.USER] for question in SHOWN_QUESTIONS]
            job, seconds = adapting.train(server.api, adapting.USER)
            if job.error:
                raise DemoError(f"the training failed: {job.error}")
            for text in (*adapting.loss_curve(job), adapting.outcome(job, seconds)):
                line(text)
            after = [ask(server.api, adapting.USER, question) for question in SHOWN_QUESTIONS]
        console.print(adapting.before_and_after(before, after))
        if sys.stdin.isatty() and sys.stdout.isatty():
            _stay_up(console, server)


@contextmanager
def _step(console: Console, number: int, what: str) -> Iterator[None]:
    console.print(f"[bold]\\[{number}/{STEPS}] {what}[/bold]")
    start_s = time.monotonic()
    yield
    console.print(f"      [green]done[/green] in {time.monotonic() - start_s:.0f} s")


def _line(console: Console, text: str) -> None:
    console.print(Text(f"      {text}", style="dim"), soft_wrap=True)


def _stay_up(console: Console, server: Server) -> None:
    try:  # from here on Ctrl-C is the normal end, even during the output
        url = server.api.url
        console.print(f"\nThe server stays up at {url} ({url}/docs). Try:\n", soft_wrap=True)
        console.print(Text(curl_lines(url, PEOPLE[0].user_id)), soft_wrap=True)
        console.print(f"\nor open the console: {url}/console\n\nCtrl-C stops everything.", soft_wrap=True)
        status = server.process.wait()
    except KeyboardInterrupt:
        console.print("\nStopping everything …")
        return
    raise DemoError(f"`mta up` ended on its own, with status {status}")
