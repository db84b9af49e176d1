"""Traces of a gateway, and of a worker: what belongs together, and that nothing in them is anybody's."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deploy.observe.pictures.receiver import Receiver, Span, receiving
from server.settings import Settings
from server.watching.tracing import open_tracing
from tests.integration.conftest import Work
from tests.support.calls import adapt, job_of
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, wait_until_ready

USER, TEXT, PROMPT = "rosa.luxemburg", "sowed beans by the gate", "what grows there"
SAMPLED = 1
CLIENTS_TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    with receiving() as running:
        yield running


@pytest.fixture(scope="module")
def traced(gateway_settings: Settings, receiver: Receiver) -> Iterator[GatewayThread]:
    """A gateway that sends traces."""
    with GatewayThread(gateway_settings.model_copy(update={"otlp_endpoint": receiver.url})) as gateway:
        yield gateway


@pytest.fixture
def client(traced: GatewayThread, receiver: Receiver, fake_engine: FakeEngine) -> Iterator[httpx.Client]:
    with traced.client() as client:
        wait_until_ready(client)
        yield client


def sent(traced: GatewayThread, receiver: Receiver) -> list[Span]:
    """All spans, once they have arrived."""
    provider: Any = traced.parts.tracing
    provider._provider.force_flush()
    return receiver.spans


def requests(spans: list[Span], name: str) -> list[Span]:
    return [span for span in spans if span.name == name]


def test_a_request_is_one_trace_down_to_the_engine(
    client: httpx.Client, traced: GatewayThread, receiver: Receiver, fake_engine: FakeEngine
) -> None:
    client.put(f"/users/{USER}/profile", json={"items": [{"text": TEXT}]}).raise_for_status()
    answer = client.post("/generate", json={"user_id": USER, "prompt": PROMPT, "max_tokens": 3}).raise_for_status()
    [request] = requests(sent(traced, receiver), "POST /generate")
    assert (request.service, request.parent) == ("mta-gateway", "")
    assert request.attributes["mta.level"] == answer.json()["personalization"]["level"]
    assert request.attributes["mta.request"] == answer.headers["x-request-id"]
    within = receiver.trace(request.trace_id)
    assert {"HGETALL", "GET", "POST"} & {span.name for span in within if span.parent == request.id}
    [call] = [span for span in within if span.name == "POST"]
    assert fake_engine.seen[-1].headers["traceparent"].startswith(f"00-{request.trace_id}-{call.id}-")
    assert "baggage" not in fake_engine.seen[-1].headers


def test_a_client_that_traces_finds_us_in_its_own_trace_and_its_baggage_stays_here(
    client: httpx.Client, traced: GatewayThread, receiver: Receiver, fake_engine: FakeEngine
) -> None:
    headers = {"traceparent": f"00-{CLIENTS_TRACE}-b7ad6b7169203331-01", "baggage": "user=rosa"}
    body = {"user_id": USER, "prompt": PROMPT, "max_tokens": 1}
    client.post("/generate", json=body, headers=headers).raise_for_status()
    assert requests(sent(traced, receiver), "POST /generate")[-1].trace_id == CLIENTS_TRACE
    assert "baggage" not in fake_engine.seen[-1].headers
    before = len(receiver.spans)
    undecided = {"traceparent": headers["traceparent"][:-1] + "0"}  # it traces, but not this one
    client.post("/generate", json=body, headers=undecided).raise_for_status()
    assert len(sent(traced, receiver)) == before


def test_looks_at_the_parts_are_no_traces(client: httpx.Client, traced: GatewayThread, receiver: Receiver) -> None:
    for path in ("/health", "/ready", "/metrics", "/console"):
        client.get(path)
    names = {span.name for span in sent(traced, receiver) if not span.parent}
    assert all(re.match(r"(GET|PUT|POST|DELETE) /(users|generate|jobs)", name) for name in names), names


def test_an_answer_by_an_adapter_is_linked_to_the_job_that_made_it(
    client: httpx.Client, traced: GatewayThread, receiver: Receiver, fake_engine: FakeEngine, work: Work
) -> None:
    job = adapt(client, USER, config={"steps": 6, "learning_rate": 0.05}).json()
    [request] = requests(sent(traced, receiver), "POST /users/{user_id}/adapt")
    work(tracing=traced.parts.tracing)
    assert job_of(client, job)["state"] == "succeeded"
    fake_engine.knobs.user_adapters = True
    answer = client.post("/generate", json={"user_id": USER, "prompt": PROMPT, "max_tokens": 1}).raise_for_status()
    assert answer.json()["personalization"]["level"] == "stacked"
    [adapted] = requests(sent(traced, receiver), "adapt")
    assert (adapted.trace_id, adapted.parent) == (request.trace_id, request.id)
    assert adapted.attributes == {"mta.outcome": "succeeded", "mta.tries": 1}
    [train] = requests(receiver.trace(adapted.trace_id), "train")
    assert (train.parent, train.attributes["mta.samples"]) == (adapted.id, 8)
    assert requests(receiver.spans, "POST /generate")[-1].links == (adapted.trace_id,)
    export = client.get(f"/users/{USER}/export").raise_for_status().json()
    kept = export["jobs"][0]["traceparent"], export["adapter"]["traceparent"]
    assert [traceparent.split("-")[1] for traceparent in kept] == [adapted.trace_id] * 2


def test_nothing_of_a_user_is_in_what_is_sent(
    client: httpx.Client, traced: GatewayThread, receiver: Receiver, fake_engine: FakeEngine
) -> None:
    url, body = f"/users/{USER}", {"user_id": USER, "prompt": PROMPT, "max_tokens": 1}
    headers = {"User-Agent": "rosas-browser", "Authorization": "Bearer rosas-key", "X-User-ID": USER}
    client.put(f"{url}/profile?note={USER}", json={"items": [{"text": TEXT}]}, headers=headers).raise_for_status()
    client.get(url, headers=headers).raise_for_status()
    client.get(f"/no/such/{USER}", headers=headers)
    client.post("/generate", json=body | {"prompt": {"text": PROMPT}}, headers=headers)
    fake_engine.knobs.garbage = PROMPT.encode()
    client.post("/generate", json=body, headers=headers)
    fake_engine.knobs.garbage = None
    client.delete(url, headers=headers).raise_for_status()
    spans, raw = sent(traced, receiver), b"".join(receiver.bodies)
    for secret in (USER, "rosa", TEXT, PROMPT, traced.key(USER), "mta3:", "redis.call"):
        assert secret.encode() not in raw, secret
    assert {span.name for span in spans} >= {"GET unmatched", "DELETE /users/{user_id}"}
    kept = {name for span in spans for name in span.attributes}
    ours = {f"mta.{name}" for name in ("request", "level", "outcome", "tries", "samples", "steps")}
    assert kept <= ours | {
        *("http.method", "http.route", "http.status_code", "http.url", "net.peer.name", "net.peer.port"),
        *("db.system", "error.type"),
    }


def test_a_collector_that_is_silent_costs_requests_nothing(
    gateway_settings: Settings, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.watching.otlp._EXPORT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = gateway_settings.model_copy(update={"otlp_endpoint": endpoint})
        with GatewayThread(settings) as gateway, gateway.client() as client:
            body = {"user_id": USER, "prompt": PROMPT, "max_tokens": 1}
            assert client.post("/generate", json=body).status_code == httpx.codes.OK


def test_only_a_share_of_requests_is_traced_where_one_is_set(receiver: Receiver) -> None:
    tracing: Any = open_tracing(Settings(otlp_endpoint=receiver.url, trace_share=0), "mta-test")
    try:
        with tracing.span("never"):
            assert int(tracing.current().rpartition("-")[2], 16) & SAMPLED == 0
    finally:
        tracing.close()
