"""The quickest runs of the benchmarks, as a person starts them: real processes, a tiny model, tables and JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.serving.histograms import BLOCKING_STEPS, COLD_PATH

RUN = [sys.executable, "-m", "server.cli", "bench"]


def ran(out: Path, *command: str) -> dict[str, Any]:
    """Run a benchmark; the JSON of all files that it wrote, by name."""
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    written = {path.stem: json.loads(path.read_text("utf-8")) for path in out.parent.glob("*.json")}
    titles = [table["title"] for content in written.values() for table in content["tables"]]
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
    out = tmp_path / "fairness.json"
    few = ("--seconds", "2", "--turns", "1", "--tokens", "4")
    done = subprocess.run(
        [*RUN, "fairness", *few, "--out", str(out)], capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode in (0, 1), done.stderr[-4000:]  # two seconds say nothing of the claims
    content = json.loads(out.read_text("utf-8"))
    did = content["rows"]["what the fourth did"]
    assert all(f" {what}" in did for what in ("events", "trickling", "wide", "deletes")), did
    assert {name for name in content["rows"] if "over" in name} == {
        "answers a second, beside over alone",
        "p99, beside over alone",
        "the three's answers a second, worst over behaving",
        "the three's p99, worst over behaving",
    }
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


def test_the_script_for_gpus_runs_without_one(tmp_path: Path) -> None:
    few = ("--recipes", "1", "--recipes", "2", "--requests", "4", "--clients", "2", "--tokens", "2", "--prompt", "8")
    command = [sys.executable, "-m", "bench.gpu", "--shape", "tiny", "--anchors", "4", "--pairs", "1", *few]
    content = ran(tmp_path / "gpu.json", *command)["gpu"]
    cold, throughput = content["tables"]
    assert [line[0] for line in cold["lines"]] == [*COLD_PATH, *BLOCKING_STEPS]
    compared = [[what, count] for what in ("recipes", "PEFT folders") for count in (1, 2)]
    assert [line[:2] for line in throughput["lines"]] == compared
    assert content["device"]
