"""The quickest runs of the benchmarks, as a person starts them: real processes, a tiny model, tables and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bank.evaluation.pictures import CURVES_FILE, GAINS_FILE, PRICES_FILE
from bank.evaluation.session import SUMMARY_FILE, TABLE_FILE
from bank.evaluation.summary import LAMP_FOLDER
from bench.serving.histograms import BLOCKING_STEPS, COLD_PATH

RUN = [sys.executable, "-m", "server.cli", "bench"]
METHODS = {
    *("base", "common", "task", "mean", "random", "merged", "stacked", "own", "merged:topic", "merged+history@h1"),
}
WRITTEN = {"common", "merged+history@h1"}


def ran(out: Path, *command: str, judged: bool = True) -> dict[str, Any]:
    """Run a benchmark; the JSON of all files that it wrote, by name. Unless `judged`, its claims may be found wrong."""
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode in ((0,) if judged else (0, 1)), done.stdout[-2000:] + done.stderr[-4000:]
    written = {path.stem: json.loads(path.read_text("utf-8")) for path in out.parent.glob("*.json")}
    titles = [table["title"] for content in written.values() for table in content.get("tables", ())]
    assert all(title.partition(",")[0] in done.stdout for title in titles)
    return written


def test_cost_of_a_tiny_model_straight_and_through_a_gateway(tmp_path: Path) -> None:
    few = ("--pairs", "2", "--tokens", "2", "--only", "150", "--only", "4 recipes", "--slots", "4", "--gateway")
    content = ran(tmp_path / "cost.json", *RUN, "cost", "--tiny", *few)["cost"]
    (table,) = content["tables"]
    rows = [dict(zip(table["columns"], line, strict=True)) for line in table["lines"]]
    labels = ["first token, prompt of 150 tokens", "a token, 16 streams over 4 recipes"]
    assert [row["ms"] for row in rows] == [*labels, "first token, prompt of 400 tokens, through the gateway"]
    for row in rows:
        assert row["recipe over base"]["n"] == 2
        assert row["base"]["min"] > 0
        assert 0 < row["limit, base"] < row["limit, recipe"]
    assert content["command"].startswith("mta bench cost --tiny")


def test_what_one_key_costs_the_others(tmp_path: Path) -> None:
    few = ("--seconds", "2", "--turns", "1", "--tokens", "4")
    content = ran(tmp_path / "fairness.json", *RUN, "fairness", *few, judged=False)["fairness"]
    did = content["rows"]["what the fourth did"]
    assert all(f" {what}" in did for what in ("events", "trickling", "wide", "deletes")), did
    ratios = {f"{what}, beside over alone" for what in ("answers a second", "p99")}
    ratios |= {f"the three's {what}, worst over behaving" for what in ("answers a second", "p99")}
    assert {name for name in content["rows"] if "over" in name} == ratios
    assert len(content["loads"]) == 4


def test_users_and_anchors_by_the_store_and_the_gateway_themselves(tmp_path: Path) -> None:
    few = ("--part", "users", "--part", "anchors", "--users", "1000", "--lookups", "100", "--anchors", "60")
    written = ran(tmp_path / "scale.json", *RUN, "scale", *few)
    (users,), (anchors,) = (written[f"scale-{part}"]["tables"] for part in ("users", "anchors"))
    figures = dict(users["lines"])
    plain = figures["bytes of a user without a signature: mean"]
    assert 800 < plain < 1024
    assert plain < figures["bytes of a user with a signature over 50 anchors: mean"] < 2048
    assert [line[:2] for line in anchors["lines"]] == [[50, "IndexFlatIP"], [60, "IndexFlatIP"]]


def test_people_are_imported_beside_streams_that_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("vllm")
    from bench.scale import __main__ as scale
    from bench.scale import importing

    monkeypatch.setattr(importing, "ALONE_S", 0.5)
    monkeypatch.setattr(importing, "TURNS", 2)
    scale.main(part=["import"], people=100, out=tmp_path / "scale.json")
    (table,) = json.loads((tmp_path / "scale-import.json").read_text("utf-8"))["tables"]
    found = dict(table["lines"])
    assert found["people imported a second"]["min"] > 0
    assert found["beside over alone"]["n"] == importing.TURNS
    assert found["the same afterwards, MiB"] > 0


def test_the_script_for_gpus_runs_without_one(tmp_path: Path) -> None:
    few = ("--recipes", "1", "--recipes", "2", "--requests", "4", "--clients", "2", "--tokens", "2", "--prompt", "8")
    command = [sys.executable, "-m", "bench.gpu", "--shape", "tiny", "--anchors", "4", "--pairs", "1", *few]
    content = ran(tmp_path / "gpu.json", *command)["gpu"]
    cold, throughput = content["tables"]
    assert [line[0] for line in cold["lines"]] == [*COLD_PATH, *BLOCKING_STEPS]
    compared = [[what, count] for what in ("recipes", "PEFT folders") for count in (1, 2)]
    assert [line[:2] for line in throughput["lines"]] == compared
    assert content["device"]


def first_column(table: str) -> set[str]:
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    return {row.split(" | ")[0].removeprefix("| ") for row in rows[2:]}


def test_quality_builds_a_bank_and_evaluates_every_method(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.quality", "--quick", "--seeds", "1", "--out", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    out = tmp_path / "quick"
    table = (out / TABLE_FILE).read_text("utf-8")
    losses, _, authors = table.partition("**Authorship**")
    everyone, _, sample = losses.partition("**2 of them**")
    assert everyone.startswith("**3 people**")
    assert first_column(everyone) == METHODS - {"stacked", "own"}
    assert first_column(sample) == METHODS
    summary = json.loads((out / SUMMARY_FILE).read_text("utf-8"))
    assert (summary["people"], summary["seeds"]) == (3, 1)
    assert {row["method"] for row in summary["authorship"]} == WRITTEN | {"gold"}
    assert first_column(authors) >= WRITTEN
    points = {row["method"] for row in summary["methods"]} - METHODS
    assert {"merged@k1", "merged@k3", "merged@n1", "merged@n5"} <= points
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in (GAINS_FILE, CURVES_FILE, PRICES_FILE))
    golds = json.loads((out / LAMP_FOLDER / "golds.json").read_text("utf-8"))["golds"]
    answered = json.loads((out / LAMP_FOLDER / "merged.json").read_text("utf-8"))["golds"]
    assert [gold["id"] for gold in golds] == [answer["id"] for answer in answered]
    assert len(golds) == 2 * 3  # texts are written for the sample alone
    assert golds[0]["output"] == "30 indeed"
