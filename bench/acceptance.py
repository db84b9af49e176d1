"""Run the checks that take long or need real histories: `make acceptance DATA=../shared/data`.

Runs the model test of the store with many more steps than `make test`, tries every base model, builds a bank of 12
anchors from the headline writers of `DATA` (kept, and resumed if it was interrupted), and runs the other benchmarks
with it one by one, printing each command first. The results are a table and `acceptance.json`, which holds the steps
done so far: after an interruption, `--resume` runs the others. Exit status 1 if a step fails or a target is missed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import script
from bench.page.report import WRONG, console, processor, shown
from bench.rig.subject import tiny
from bench.rig.up import up
from server.settings import load_settings

TASK = "news_headline"
RESULT = "acceptance.json"
ANCHORS = 12


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


def _counts(value: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", value))


OWN_VERDICT = Target("", "as the script itself demands", lambda value: WRONG not in str(value))
FUSE = (Target("merge over worker", "at least 5", lambda value: value["median"] >= 5),)
SOAK = (
    Target("answers", "all", lambda value: len(set(_counts(value))) == 1),
    Target("stream still running", "yes", bool),
    Target("of them not this recipe's own", "0", lambda value: value == 0),
    Target("growth of", "at most 3 %", lambda value: value <= 3),
    Target("names known", "at most 1024", lambda value: value <= 1024),
    Target("/metrics, lines", "no growth", lambda value: _counts(value)[-1] <= _counts(value)[-2]),
)
PACKAGES = (
    Target("components in the SBOM of gateway", "all", lambda value: value > 0),
    Target("known vulnerabilities", "none", lambda value: value in ("none", "none in those", "not checked")),
    Target("packages looked up", "all", lambda value: len(set(_counts(value))) == 1, binding=False),
)
SERVED = (Target("answers not served", "0", lambda value: value == 0),)
NO_IMAGES = "make images (with STAND_INS=1 where no registry of images can be reached)"
CHAT_APP = "python -m venv APP && APP/bin/pip install open-webui, then set CHAT_APP_PYTHON=APP/bin/python"
GATEWAY = (Target("whole, 1 concurrent: added at p50", "3 ms", lambda value: value["median"] <= 3, binding=False),)


class Run:
    """Runs steps one after the other and collects their outcomes.

    Args:
        out: folder of the reports and of the result, which is written after each step.
        console: console for the progress.
        earlier: outcomes of an earlier run; the steps that ran and passed are not run again.
        only: name of the one step to run, even if it passed earlier; all if empty.
    """

    def __init__(self, out: Path, console: Console, earlier: Iterable[Outcome] = (), only: str = "") -> None:
        self.outcomes: list[Outcome] = []
        self.names: dict[str, None] = {}  # of all steps
        self._only = only
        self._out = out
        self._console = console
        self._earlier = {outcome.step: outcome for outcome in earlier if outcome.command and outcome.passed}

    def step(self, name: str, command: Iterable[object], targets: Iterable[Target] = (), key: str = "") -> bool:
        """Run a command, with the engine's key if needed, and judge a benchmark's report by `targets`."""
        if self._keep(name):
            return True
        argv = [str(part) for part in command]
        report = self._out / f"{argv[1].partition('.')[2]}.json" if targets else None
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
        self.names[name] = None
        if name == self._only:
            return False
        outcome = self._earlier.get(name)
        if outcome:
            self._console.print(f"{name}: passed earlier")
            self._add(outcome)
        return outcome is not None or bool(self._only)

    def _add(self, outcome: Outcome) -> bool:
        self.outcomes.append(outcome)
        content = {"machine": processor(), "steps": [asdict(one) for one in self.outcomes]}
        (self._out / RESULT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return outcome.passed


def main(
    data: Annotated[Path, typer.Option(help="Folder of the real histories.", exists=True, file_okay=False)],
    out: Annotated[Path, typer.Option(help="Folder for the bank and the reports.")] = Path("out/acceptance"),
    app_python: Annotated[
        Path | None, typer.Option(help="Python with the package `open-webui`.", envvar="CHAT_APP_PYTHON")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the steps that passed in an earlier run.")] = False,
    only: Annotated[
        str, typer.Option("--only", help="Run this step alone, with the bank of an earlier run; implies --resume.")
    ] = "",
) -> None:
    """Run everything, and print one table at the end."""
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, console(), earlier(out / RESULT) if resume or only else (), only)
    bank, users = out / f"{TASK}-{ANCHORS}", data / TASK / "users.json"
    model = ("tests/contract/test_store_model.py", "--hypothesis-profile=long")
    run.step("the store's promises, 50,000 steps", ("-m", "pytest", "-q", *model))
    run.step("base models", ("-m", "pytest", "-q", "-m", "", "tests/integration/test_architectures.py"))
    run.step("benchmarks", ("-m", "pytest", "-q", "-m", "acceptance", "tests/integration/test_bench.py"))
    run.step("a store that is lost", ("-m", "pytest", "-q", "-m", "", "tests/integration/test_backup.py"))
    run.step("what the version before wrote", ("-m", "pytest", "-q", "-m", "", "tests/integration/test_earlier.py"))
    run.step("packages", ("-m", "deploy.audit"), PACKAGES)
    run.step("the wheel", ("-m", "deploy.wheel"), (OWN_VERDICT,))
    build = ("--users", data / TASK / "anchors.json", "--task", TASK, "--anchors", ANCHORS, "--out", bank)
    served = ("--bank", str(bank), "--model", load_settings().model)
    people = ("--users", users, *served)
    if run.step("a bank of real people", ("-m", "server.cli", "bank", "build", *build, "--baselines")):
        run.step("fuse", ("-m", "bench.serving.cold", "--bank", bank), FUSE)
        run.step("soak", ("-m", "bench.scale.soak"), SOAK)
        _fleets(run, bank)
        measured = ("-m", "bench.serving.gateway", "--max-tokens", 32)
        run.served(
            "gateway",
            (out / "tiny-data", _tiny(out / "tiny")),
            lambda url, engine: (*measured, "--gateway", url, "--engine", engine),
            GATEWAY,
        )
        run.step("overload", ("-m", "bench.fleet.overload"), (OWN_VERDICT,))
        run.step("feedback beside answers", ("-m", "bench.learning.rate"), SERVED)
        learn = ("-m", "bench.learning.predict", "--users", users, "--bank", bank, "--out", out / "learning")
        run.step("predict, then learn", (*learn, "--people", 4, "--texts", 9, "--refresh", 6))
        if app_python:
            chat = ("-m", "bench.learning.chats", "--bank", bank, "--app-python", app_python)
            run.step("a chat app in a browser", (*chat, "--out", out / "chats"))
        else:
            run.skip("a chat app in a browser", CHAT_APP)
        # In bfloat16 an answer depends on its batch where two tokens nearly tie, so use float32.
        run.served(
            "users",
            (out / "data", (*served, "--dtype", "float32")),
            lambda url, engine: ("-m", "bench.serving.users", "--users", users, "--url", url, "--engine", engine),
            (OWN_VERDICT,),
        )
        run.served(
            "serving equals training",
            (out / "data", (*served, "--dtype", "float32")),
            lambda _, engine: ("-m", "server.cli", "verify", *served, "--engine-url", engine),
            (),
        )
        run.served(
            "beside a job",
            (out / "adapt-data", served),
            lambda url, _: ("-m", "bench.adapt.beside", "--gateway", url),
            (OWN_VERDICT,),
        )
        run.step("two engines as one", ("-m", "bench.fleet.replicas", *people), (OWN_VERDICT,))
        run.step("quality", ("-m", "server.cli", "eval", *people, "--out", out / "quality", "--no-predict"))
    if only and only not in run.names:
        raise typer.BadParameter(f"no step is called {only!r}, only {', '.join(run.names)}", param_hint="--only")
    console().print(_table(run.outcomes))
    if not all(outcome.passed for outcome in run.outcomes):
        raise typer.Exit(1)


def earlier(result: Path) -> list[Outcome]:
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


def _tiny(folder: Path) -> tuple[str, ...]:
    """Create a tiny model and its bank, and return them as options; the gateway's cost does not depend on the model."""
    subject = tiny(folder)
    return "--bank", str(subject.bank), "--model", str(subject.model)


def _fleets(run: Run, bank: Path) -> None:
    """Kill and exchange the parts of fleets, as processes and as containers, and simulate larger ones."""
    run.step("chaos", ("-m", "bench.fleet.chaos"), (OWN_VERDICT,))
    run.step("all exchanged under load", ("-m", "bench.fleet.rolling"), (OWN_VERDICT,))
    lasting = ("--minutes", 30, "--death-s", 90, "--backup-minutes", 10)
    run.step("half an hour of everything", ("-m", "bench.fleet.lasting", *lasting), (OWN_VERDICT,))
    run.step("a simulated fleet", ("-m", "bench.fleet.simulate", "--check"))
    _containers(run, bank)


def _containers(run: Run, bank: Path) -> None:
    """Run the compose files where Docker or Podman has our images."""
    for tool in filter(shutil.which, ("docker", "podman")):
        listed = subprocess.run(
            [tool, "images", "--format", "{{.Repository}}"], capture_output=True, text=True, check=False
        )
        if {"mta-gateway", "mta-engine-cpu"} <= {name.rpartition("/")[2] for name in listed.stdout.split()}:
            run.step("containers", ("-m", "deploy.containers", "test", "--bank", bank), (OWN_VERDICT,))
            return
    run.skip("containers", NO_IMAGES)


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


def _table(outcomes: Iterable[Outcome]) -> Table:
    """Return a table of every step with its time and figures."""
    table = Table("step", "time", "figure", "value", "wanted", "", title="Acceptance", title_justify="left")
    for outcome in outcomes:
        verdict = "[green]passed[/green]" if outcome.passed else "[bold red]failed[/bold red]"
        table.add_row(f"[bold]{outcome.step}[/bold]", f"{outcome.seconds:.0f} s", "", "", "", verdict)
        for figure in outcome.figures:
            mark = "" if figure.met else ("[bold red]missed[/bold red]" if figure.binding else "short of the aim")
            table.add_row("", "", figure.label, escape(figure.value), figure.wanted, mark)
        table.add_section()
    return table


if __name__ == "__main__":
    script(main)
