"""The quickest runs of benchmarks: real processes, a tiny model, tables and JSON. Most share one engine."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest
import typer

pytest.importorskip("vllm")

from bench.fleet import fairness
from bench.rig import limits
from bench.rig.engine import Engine
from bench.rig.servers import vllm_server
from bench.rig.subject import tiny
from bench.scale import __main__ as scale
from bench.scale import importing
from bench.serving import cost
from bench.serving.histograms import BLOCKING_STEPS, COLD_PATH
from evaluation.pictures import CURVES_FILE, GAINS_FILE, PRICES_FILE
from evaluation.session import SUMMARY_FILE, TABLE_FILE
from evaluation.summary import LAMP_FOLDER

METHODS = {
    *("base", "common", "task", "mean", "random", "merged", "stacked", "own", "merged:topic", "merged+history@h1"),
}
WRITTEN = {"common", "merged+history@h1"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Serves the model and the bank that each benchmark makes anew."""
    subject = tiny(tmp_path_factory.mktemp("bench"))
    with vllm_server(subject, max_num_seqs=fairness.PLACES, max_loras=fairness.USERS) as engine:
        yield engine


@pytest.fixture
def shared(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has benchmarks use that engine, and undoes what is meant for a process of their own."""
    for module in (cost, fairness, importing):
        monkeypatch.setattr(module, "vllm_server", lambda *_, **__: nullcontext(engine))
    cores = os.sched_getaffinity(0)
    yield
    os.sched_setaffinity(0, cores)
    gc.unfreeze()


def written(out: Path, printed: str) -> dict[str, Any]:
    """The JSON of a run, whose tables were printed as well."""
    content: dict[str, Any] = json.loads(out.read_text("utf-8"))
    assert all(table["title"].partition(",")[0] in printed for table in content["tables"])
    return content


@pytest.mark.usefixtures("shared")
def test_cost_of_a_tiny_model_straight_and_through_a_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(limits, "_WHILE_S", 0.1)
    few: dict[str, Any] = {"pairs": 2, "tokens": 12, "only": ["150", "4 recipes"], "slots": [4], "gateway": True}
    cost.main(tiny_model=True, out=tmp_path / "cost.json", **few)
    (table,) = written(tmp_path / "cost.json", capsys.readouterr().out)["tables"]
    rows = [dict(zip(table["columns"], line, strict=True)) for line in table["lines"]]
    labels = ["first token, prompt of 150 tokens", "a token, 16 streams over 4 recipes"]
    assert [row["ms"] for row in rows] == [*labels, "first token, prompt of 400 tokens, through the gateway"]
    for row in rows:
        assert row["recipe over base"]["n"] == 2
        assert row["base"]["min"] > 0
        assert 0 < row["limit, base"] < row["limit, recipe"]


@pytest.mark.usefixtures("shared")
def test_people_are_imported_beside_streams_that_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "ALONE_S", 1.0)
    monkeypatch.setattr(importing, "TURNS", 2)
    scale.main(part=["import"], people=100, out=tmp_path / "scale.json")
    (table,) = json.loads((tmp_path / "scale-import.json").read_text("utf-8"))["tables"]
    found = dict(table["lines"])
    assert found["people imported a second"]["min"] > 0
    assert found["beside over alone"]["n"] == importing.TURNS
    assert found["the same afterwards, MiB"] > 0


@pytest.mark.usefixtures("shared")
def test_what_one_key_costs_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "LEAD_IN_S", 1.0)
    with suppress(typer.Exit):  # a second says nothing of the claims
        fairness.main(seconds=1, turns=1, tokens=4, out=tmp_path / "fairness.json")
    content = json.loads((tmp_path / "fairness.json").read_text("utf-8"))
    did = content["rows"]["what the fourth did"]
    assert all(f" {what}" in did for what in ("events", "trickling", "wide", "deletes")), did
    ratios = {f"{what}, beside over alone" for what in ("answers a second", "p99")}
    ratios |= {f"the three's {what}, worst over behaving" for what in ("answers a second", "p99")}
    assert {name for name in content["rows"] if "over" in name} == ratios
    assert len(content["loads"]) == 4


def test_scale_bench_measures_users_and_anchors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scale.main(part=["users", "anchors"], users=1000, lookups=100, anchors=60, out=tmp_path / "scale.json")
    printed = capsys.readouterr().out
    (users,), (anchors,) = (
        written(tmp_path / f"scale-{part}.json", printed)["tables"] for part in ("users", "anchors")
    )
    figures = dict(users["lines"])
    plain = figures["bytes of a user without a signature: mean"]
    assert 800 < plain < 1024
    assert plain < figures["bytes of a user with a signature over 50 anchors: mean"] < 2048
    assert [line[:2] for line in anchors["lines"]] == [[50, "IndexFlatIP"], [60, "IndexFlatIP"]]


@pytest.mark.acceptance
def test_recipes_are_measured_without_a_gpu(tmp_path: Path) -> None:
    few = ("--recipes", "1", "--recipes", "2", "--requests", "4", "--clients", "2", "--tokens", "2", "--prompt", "8")
    command = [sys.executable, "-m", "bench.serving.recipes", "--shape", "tiny", "--anchors", "4", "--pairs", "1", *few]
    out = ("--out", str(tmp_path / "recipes.json"))
    done = subprocess.run([*command, *out], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    content = written(tmp_path / "recipes.json", done.stdout)
    assert content["command"].startswith("python -m bench.serving.recipes --shape tiny")
    cold, throughput = content["tables"]
    assert [line[0] for line in cold["lines"]] == [*COLD_PATH, *BLOCKING_STEPS]
    compared = [[what, count] for what in ("recipes", "PEFT folders") for count in (1, 2)]
    assert [line[:2] for line in throughput["lines"]] == compared


def first_column(table: str) -> set[str]:
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    return {row.split(" | ")[0].removeprefix("| ") for row in rows[2:]}


@pytest.mark.acceptance
def test_quality_builds_a_bank_and_evaluates_every_method(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evaluation.studies", "--quick", "--seeds", "1", "--out", str(tmp_path)]
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
    assert {"merged@k1", "merged@k3", "mean@k1", "mean@k3", "merged@n1", "merged@n5"} <= points
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in (GAINS_FILE, CURVES_FILE, PRICES_FILE))
    golds = json.loads((out / LAMP_FOLDER / "golds.json").read_text("utf-8"))["golds"]
    answered = json.loads((out / LAMP_FOLDER / "merged.json").read_text("utf-8"))["golds"]
    assert [gold["id"] for gold in golds] == [answer["id"] for answer in answered]
    assert len(golds) == 2 * 3  # texts are written for the sample alone
    assert golds[0]["output"] == "30 indeed"
