"""A real run, watched by all means: metrics in a real Prometheus, alerts by real faults, traces, and logs."""

from __future__ import annotations

import json
import math
import re
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from bench.rig.processes import paused, wait_until
from deploy.observe import dashboard
from tests.support.documented import ROOT, Reader, blocks_of
from tests.support.observe.prometheus import BINARY, CONFIGURATION
from tests.support.observe.receiver import Span
from tests.support.observe.watched import PEOPLE, STACKED, Watched, use, watched


def spans_of(run: Watched, name: str) -> list[Span]:
    return [span for span in run.receiver.spans if span.name == name]


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory, tiny_bank_folder: Path, tiny_model_folder: Path, embedder_folder: Path
) -> Iterator[Watched]:
    if BINARY is None:
        pytest.skip("Prometheus is not installed (Debian: prometheus)")
    folder = tmp_path_factory.mktemp("watched")
    options = ("--bank", str(tiny_bank_folder), "--model", str(tiny_model_folder), "--max-loras", "2")
    with watched(folder, *options, MTA_EMBEDDER=str(embedder_folder)) as run:
        use(run, 6)
        yield run


def test_committed_dashboard_is_current_and_alerts_are_tested() -> None:
    assert dashboard.FILE.read_text("utf-8") == dashboard.dashboard(), "run python -m deploy.observe.dashboard"
    alerts = set(re.findall(r"- alert: (\w+)", (CONFIGURATION / "alerts.yml").read_text("utf-8")))
    assert len(alerts) > 5
    for file in (ROOT / "docs/operations.md", CONFIGURATION / "alerts_test.yml"):
        assert alerts <= set(re.findall(r"\bMta\w+", file.read_text("utf-8"))), file.name


@pytest.mark.skipif(BINARY is None, reason="Prometheus is not installed (Debian: prometheus)")
def test_rules_and_configurations_are_what_prometheus_takes() -> None:
    for command in (
        ("promtool", "check", "rules", "alerts.yml"),
        ("promtool", "test", "rules", "alerts_test.yml"),
        ("promtool", "check", "config", "--syntax-only", "prometheus.yml"),
        ("promtool", "check", "config", "--syntax-only", "../k8s/prometheus.yml"),
    ):
        done = subprocess.run(command, cwd=CONFIGURATION, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_dashboard_query_has_data_and_figures_are_right(run: Watched) -> None:
    def has_data(expression: str) -> bool:
        found = run.prometheus.over_time(expression, run.began_s, time.time())
        return any(math.isfinite(float(value)) for series in found for _, value in series["values"])

    for graph in dashboard.graphs():
        for query in graph.queries:  # the store's figures are read every ten seconds
            wait_until(partial(has_data, query.expression), f"data of {graph.title}: {query.expression}")
    for expression, least, most in (
        ('mta_worker_jobs_total{outcome="succeeded"}', 1, 1),
        ('mta_generations_total{level="stacked",outcome="answered",tenant="default"}', 2, math.inf),
        ('mta_generations_total{outcome="refused"}', 1, math.inf),
        ('mta_tokens_total{level="stacked",kind="completion"}', 1, math.inf),
        ('mta_engine_slots{job="engine"}', 2, 2),
        ('mta_engine_slots_resident{job="engine"}', 2, 2),
        ("mta_engine_slot_evictions_total", len(PEOPLE) - 2, math.inf),  # more people than slots
    ):
        [found] = run.prometheus.asked(f"sum({expression})")
        assert least <= float(found["value"][1]) <= most, expression


def test_traces_cover_engine_and_store_and_link_the_workers_job(
    run: Watched,
) -> None:
    request = spans_of(run, "POST /generate")[0]
    wait_until(lambda: any(span.service == "mta-engine" for span in run.receiver.trace(request.trace_id)), "the engine")
    within = {span.name: span for span in run.receiver.trace(request.trace_id)}
    assert within["POST"].parent == request.id
    assert within["llm_request"].parent == within["prepare"].parent == within["POST"].id
    assert within["llm_request"].attributes["gen_ai.usage.completion_tokens"] > 0
    for name, command in (("POST /generate", "EVALSHA"), ("PUT /users/{user_id}/profile", "EVALSHA")):
        request = spans_of(run, name)[0]
        within = run.receiver.trace(request.trace_id)
        asked = [span for span in within if span.attributes.get("db.system") == "redis"]
        assert command in {span.name for span in asked}
        assert all(request.start_ns <= span.start_ns <= span.end_ns <= request.end_ns for span in asked)
        assert all(re.fullmatch("[A-Z ]+", span.name) for span in asked)
    [write, *_] = [span for span in within if span.name == "store write"]
    assert "EVALSHA" in {span.name for span in asked if span.parent == write.id}
    wait_until(lambda: spans_of(run, "adapt") != [], "the worker's spans")
    [adapt], [request] = spans_of(run, "adapt"), spans_of(run, "POST /users/{user_id}/adapt")
    assert (adapt.service, adapt.trace_id, adapt.parent) == ("mta-worker", request.trace_id, request.id)
    linked = [span for span in spans_of(run, "POST /generate") if adapt.trace_id in span.links]
    assert {span.attributes["mta.level"] for span in linked} == {"stacked"}


def test_nothing_of_a_user_is_a_label_or_in_any_span(run: Watched) -> None:
    for name in (*PEOPLE, "mta3:"):
        assert run.prometheus.asked(f'count({{__name__!="",__name__=~".+",lora=~".*{name}.*"}})') == []
    shown = json.dumps(run.prometheus._get("series", **{"match[]": '{job=~".+"}'}))
    assert "mta3:" not in shown
    assert f'"{STACKED}"' not in shown
    raw = b"".join(run.receiver.bodies)
    for secret in (STACKED, *PEOPLE.values(), "Tell me about it", "mta3:", "redis.call"):
        assert secret.encode() not in raw, secret


@pytest.mark.parametrize("part", ["gateway", "engine", "worker"])
def test_each_part_logs_objects(run: Watched, part: str) -> None:
    lines = [line for line in run.log(part).splitlines() if line]
    read = [json.loads(line) for line in lines if line.startswith("{")]
    assert {"time", "level", "logger", "message"} <= read[0].keys()
    assert len(read) > 0.9 * len(lines), [line for line in lines if not line.startswith("{")]
    if part == "gateway":
        [line] = [line for line in read if line.get("route") == "/users/{user_id}/adapt"]
        assert (line["status"], len(line["request"]), len(line["trace"])) == (202, 24, 32)
        assert line["trace"] == spans_of(run, "adapt")[0].trace_id
    if part == "worker":
        [line] = [line for line in read if "held-out loss" in line["message"]]
        assert line["trace"] == spans_of(run, "adapt")[0].trace_id


def test_what_docs_say_can_be_typed_gives_what_they_show(run: Watched) -> None:
    reader = Reader(run.server.url, ROOT, {})
    for block in blocks_of("docs/operations.md"):
        if block.reason is None:
            reader.try_block(block)


def part(run: Watched, name: str) -> int:
    pid = run.server.part(name)
    assert pid
    return pid


def test_alerts_fire_when_an_engine_stands_still(run: Watched) -> None:
    alerts = {"MtaPartDown", "MtaNotReady"}
    assert not run.prometheus.firing() & alerts
    with paused(part(run, "engine")):
        wait_until(lambda: run.prometheus.firing() >= alerts, "the alerts")
    wait_until(lambda: not run.prometheus.firing() & alerts, "them to end")


def test_an_alert_fires_when_no_worker_takes_a_job(run: Watched) -> None:
    with paused(part(run, "worker")), run.client as client:
        samples = [{"input": "q", "output": "a"}] * 2
        job = client.post("/users/ben/adapt", json={"samples": samples}).raise_for_status().json()
        wait_until(lambda: "MtaJobsWait" in run.prometheus.firing(), "the alert")
        client.delete(f"/jobs/{job['id']}").raise_for_status()


def test_alerts_fire_when_the_store_is_gone(run: Watched) -> None:
    with paused(part(run, "valkey")), run.client as client:

        def fired() -> bool:  # asked again and again: a rate is seen from a series' second sample on
            body = {"user_id": "ben", "prompt": "x", "max_tokens": 1}
            assert client.post("/generate", json=body).status_code == 503
            return run.prometheus.firing() >= {"MtaStoreFails", "MtaGenerationsFail", "MtaNotReady"}

        wait_until(fired, "the alerts")
