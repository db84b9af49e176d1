"""Steps of a long run, each a command of its own: what passed is kept for `--resume`, and one table shows them all."""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from bench.page.report import WRONG, console, machine, shown
from bench.rig.up import up


@dataclass(frozen=True, slots=True)
class Target:
    """A target for some rows of a benchmark's report."""

    row: str  # prefix of the rows' labels; at least one row must match
    wanted: str  # the target in words
    met: Callable[[Any], bool]  # whether a row's value meets the target
    binding: bool = True  # whether missing the target fails the run


@dataclass(frozen=True, slots=True)
class Figure:
    """A row of a report with its target."""

    label: str
    value: str
    wanted: str
    met: bool
    binding: bool


@dataclass(slots=True)
class Outcome:
    """The outcome of a step."""

    step: str
    command: str
    seconds: float
    status: int
    figures: list[Figure] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the step completed and met every binding target."""
        return self.status == 0 and all(figure.met or not figure.binding for figure in self.figures)


OWN_VERDICT = Target("", "as the script itself demands", lambda value: WRONG not in str(value))


ResumeOption = Annotated[bool, typer.Option("--resume", help="Keep the steps that passed in an earlier run.")]
OnlyOption = Annotated[str, typer.Option("--only", help="Run this step alone, after an earlier run; implies --resume.")]


class Run:
    """Runs steps one after the other and writes their outcomes to `result` after each; reports lie in its folder.

    Of an earlier run it keeps, if it resumes, the steps that ran and passed. `only` names the one step to run, even if
    it passed earlier; empty: all.
    """

    def __init__(self, result: Path, *, resume: bool, only: str) -> None:
        self.outcomes: list[Outcome] = []
        self._names: dict[str, None] = {}  # of all steps
        self._only = only
        self._result = result
        self._console = console()
        result.parent.mkdir(parents=True, exist_ok=True)
        earlier = _read(result) if resume or only else []
        self._earlier = {outcome.step: outcome for outcome in earlier if outcome.command and outcome.passed}

    def step(self, name: str, command: Iterable[object], targets: Iterable[Target] = (), key: str = "") -> bool:
        """Run a command, with the engine's key if needed, and judge a benchmark's report by `targets`."""
        if self._keep(name):
            return True
        argv = [str(part) for part in command]
        report = self._result.parent / f"{argv[1].partition('.')[2]}.json" if targets else None
        if report:
            report.unlink(missing_ok=True)
            argv += ["--out", str(report)]
        line = shlex.join(["python", *argv])
        self._console.rule(f"[bold]{name}[/bold]", align="left")
        self._console.print(line, style="dim", soft_wrap=True)
        start_s = time.monotonic()
        environment = os.environ | ({"MTA_ENGINE_KEY": key} if key else {})
        status = subprocess.run([sys.executable, *argv], env=environment, check=False).returncode
        outcome = Outcome(name, line, time.monotonic() - start_s, status)
        if report:
            outcome.figures = judge(report, targets)
        self._console.print(f"{name}: {outcome.seconds:.0f} s, exit status {status}")
        return self._add(outcome)

    def skip(self, name: str, remedy: str) -> None:
        """Record a step that this machine cannot run, with what it needs."""
        if self._keep(name):
            return
        self._console.print(f"{name}: skipped, {remedy}", soft_wrap=True)
        self._add(Outcome(name, "", 0, 0, [Figure("skipped", remedy, "", met=True, binding=False)]))

    def served(
        self,
        name: str,
        server: tuple[Path, tuple[str, ...]],
        command: Callable[[str, str], Iterable[object]],
        targets: Iterable[Target],
    ) -> None:
        """Run a step beside `mta up`, whose data folder and options are `server`.

        `command` receives the URLs of gateway and engine. If the server does not start, the step fails.
        """
        if self._keep(name):
            return
        start_s = time.monotonic()
        try:
            with _served(server[0], *server[1]) as (url, engine, key):
                self.step(name, command(url, engine), targets, key)
        except Exception as error:
            self._console.print(str(error), markup=False, soft_wrap=True)
            figure = Figure("error", str(error).partition("\n")[0], "none", met=False, binding=True)
            self._add(Outcome(name, "", time.monotonic() - start_s, 1, [figure]))

    def _keep(self, name: str) -> bool:
        """Return whether a step is not to be run; keep its outcome if it passed earlier."""
        self._names[name] = None
        if name == self._only:
            return False
        outcome = self._earlier.get(name)
        if outcome:
            self._console.print(f"{name}: passed earlier")
            self._add(outcome)
        return outcome is not None or bool(self._only)

    def _add(self, outcome: Outcome) -> bool:
        self.outcomes.append(outcome)
        content = {"machine": machine(), "steps": [asdict(one) for one in self.outcomes]}
        self._result.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return outcome.passed

    def end(self, title: str) -> None:
        """Print the table of all steps. Raises typer.Exit(1) if one failed, BadParameter if none is called `only`."""
        if self._only and self._only not in self._names:
            names = ", ".join(self._names)
            raise typer.BadParameter(f"no step is called {self._only!r}, only {names}", param_hint="--only")
        self._console.print(_table(title, self.outcomes))
        if not all(outcome.passed for outcome in self.outcomes):
            raise typer.Exit(1)


def _read(result: Path) -> list[Outcome]:
    """Return the outcomes in a result; none if there is no result."""
    steps = json.loads(result.read_text(encoding="utf-8"))["steps"] if result.exists() else []
    return [Outcome(**(step | {"figures": [Figure(**figure) for figure in step["figures"]]})) for step in steps]


@contextmanager
def _served(data: Path, *options: str) -> Iterator[tuple[str, str, str]]:
    """Run `mta up` with some options; yield the URL of the gateway, and the URL and key of the engine."""
    key = secrets.token_urlsafe(16)
    with up(data, *options, environment={"MTA_ENGINE_KEY": key}) as server:
        engine = re.search(r"engine +ready +(\S+)", server.process.output)
        assert engine, server.process.output
        yield server.url, f"http://{engine[1]}", key


def judge(report: Path, targets: Iterable[Target]) -> list[Figure]:
    """Judge the rows that have a target; a target without a row is missed."""
    rows = json.loads(report.read_text(encoding="utf-8"))["rows"] if report.exists() else {}
    figures = []
    for target in targets:
        judged = {label: value for label, value in rows.items() if label.startswith(target.row)}
        for label, value in judged.items():
            figures.append(Figure(label, shown(value), target.wanted, target.met(value), target.binding))
        if not judged:
            figures.append(Figure(target.row, "no such row", target.wanted, met=False, binding=True))
    return figures


def _table(title: str, outcomes: Iterable[Outcome]) -> Table:
    """Return a table of every step with its time and figures."""
    table = Table("step", "time", "figure", "value", "wanted", "", title=title, title_justify="left")
    for outcome in outcomes:
        verdict = "[green]passed[/green]" if outcome.passed else "[bold red]failed[/bold red]"
        table.add_row(f"[bold]{outcome.step}[/bold]", f"{outcome.seconds:.0f} s", "", "", "", verdict)
        for figure in outcome.figures:
            mark = "" if figure.met else ("[bold red]missed[/bold red]" if figure.binding else "short of the aim")
            table.add_row("", "", figure.label, escape(figure.value), figure.wanted, mark)
        table.add_section()
    return table
