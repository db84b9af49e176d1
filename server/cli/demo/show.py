"""The steps of the demo, from nothing to personalised answers in a table."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.text import Text

from mta_client import Client, MtaError
from server.cli.demo import adapting
from server.cli.demo.answers import DemoAnswer, answers_table, ask, curl_lines
from server.cli.demo.bank import build_bank
from server.cli.demo.personas import NOBODY, PEOPLE, QUESTIONS, Persona, anchors
from server.cli.demo.server import DemoError, Server, run_mta, running_server
from server.watching.background import exit_on_signals

SHOWN_QUESTIONS = QUESTIONS[:2]
_PLAIN_WIDTH = 100
_EXCERPT_CHARS = 44


class Teller:
    """Prints the steps of the demo."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._steps = steps
        self._step = 0

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Announce a step, and print its duration at the end."""
        self._step += 1
        self._console.print(f"[bold]\\[{self._step}/{self._steps}] {what}[/bold]")
        start_s = time.monotonic()
        yield
        self._console.print(f"      [green]done[/green] in {time.monotonic() - start_s:.0f} s")

    def line(self, text: str) -> None:
        """Print a line within the step."""
        self._console.print(Text(f"      {text}", style="dim"), soft_wrap=True)


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
    teller = Teller(console, steps=6)
    people = anchors()
    with teller.step("mta models: a base model and an embedder, made once"):
        run_mta("models")
    with teller.step(f"mta bank build: {len(people)} made-up people become anchors, once"):
        bank = build_bank(people)
    with ExitStack() as stack:
        with teller.step("mta up: the server"):
            server = stack.enter_context(running_server(bank, data, teller.line))
        with teller.step("Three people who are not anchors, each with a few lines of their writing"):
            for person in PEOPLE:
                server.api.forget(person.user_id, missing_ok=True)  # left by an earlier run
                server.api.put_profile(person.user_id, person.lines)
                teller.line(f"PUT /users/{person.user_id}/profile: {len(person.lines)} lines, {_excerpt(person)}")
        with teller.step("POST /generate: the same questions, as nobody and as each of them"):
            answers = _ask_all(server.api)
        console.print(answers_table(SHOWN_QUESTIONS, answers, _looks()))
        with teller.step(
            f"POST /users/{adapting.USER}/adapt: {adapting.SAMPLES} samples of a habit that no anchor has"
        ):
            before = [answers[question, adapting.USER] for question in SHOWN_QUESTIONS]
            training = adapting.train(server.api, adapting.USER)
            if training.job.error:
                raise DemoError(f"the training failed: {training.job.error}")
            for line in (*adapting.loss_curve(training.losses), adapting.outcome(training)):
                teller.line(line)
            after = [ask(server.api, adapting.USER, question) for question in SHOWN_QUESTIONS]
        console.print(adapting.before_and_after(before, after))
        if sys.stdin.isatty() and sys.stdout.isatty():
            _stay_up(console, server)


def _ask_all(client: Client) -> dict[tuple[str, str], DemoAnswer]:
    ask(client, NOBODY, QUESTIONS[-1])  # warm up: the first request is slow
    askers = [NOBODY, *(person.user_id for person in PEOPLE)]
    return {(question, user_id): ask(client, user_id, question) for question in SHOWN_QUESTIONS for user_id in askers}


def _excerpt(person: Persona) -> str:
    """Return the start of a person's writing on one line."""
    return f"“{' '.join(person.lines[0].split())[:_EXCERPT_CHARS]}…”"


def _looks() -> dict[str, str]:
    """Return the user ids with the mark to look for in their answers."""
    return {NOBODY: "no profile"} | {person.user_id: person.manner.mark for person in PEOPLE}


def _stay_up(console: Console, server: Server) -> None:
    """Keep the server running until Ctrl-C."""
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
