"""The steps of the demo, from nothing to personalised answers in a table."""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from rich.console import Console
from rich.text import Text

from demo.answers import curl_lines
from demo.personas import PEOPLE, anchors
from demo.tour import tour
from mta_client import MtaError
from server.cli.demo.server import DemoError, Server, demo_bank, run_mta, running_server
from server.observability.background import exit_on_signals

STEPS = 6
_PLAIN_WIDTH = 100


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
    numbers, line = count(1), partial(_line, console)

    def step(title: str) -> AbstractContextManager[None]:
        return _step(console, next(numbers), title)

    with step("mta models: a base model and an embedder, made once"):
        run_mta("models")
    with step(f"mta bank build: {len(anchors())} made-up people become anchors, once"):
        bank = demo_bank()
    with ExitStack() as stack:
        with step("mta up: the server"):
            server = stack.enter_context(running_server(bank, data, line))
        for table in tour(server.api, step, line):
            console.print(table)
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
