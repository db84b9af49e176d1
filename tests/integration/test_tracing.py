"""Traces of a gateway, and of a worker: what belongs together, and that nothing in them is anybody's."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from server.observability import open_tracing
from server.settings import Settings
from tests.integration.conftest import Work
from tests.support.calls import adapt, job_of
from tests.support.fake_engine import FakeEngine, Seen
from tests.support.gateway import GatewayThread, wait_until_ready
from tests.support.observe.receiver import Receiver, Span

USER, TEXT, PROMPT = "rosa.luxemburg", "sowed beans by the gate", "what grows there"
BODY = {"user_id": USER, "prompt": PROMPT, "max_tokens": 1}
SAMPLED = 1
CLIENTS_TRACE = "0af7651916cd43dd8448eb211c80319c"


@dataclass(frozen=True)
class Traced:
    """A gateway that sends traces, a client of it, and what receives them."""

    gateway: GatewayThread
    receiver: Receiver
    client: httpx.Client
    engine: FakeEngine

    def spans(self, name: str = "") -> list[Span]:
        """All spans so far, or those of a name."""
        tracing: Any = self.gateway.opened.tracing
        tracing._provider.force_flush()
        return [span for span in self.receiver.spans if name in ("", span.name)]

    def generate(self, **headers: str) -> tuple[httpx.Response, Seen]:
        """An answer, and what the engine saw of the request."""
        answer = self.client.post("/generate", json=BODY, headers=headers).raise_for_status()
        return answer, self.engine.seen[-1]


@pytest.fixture(scope="module")
def traced_gateway(gateway_settings: Settings, receiver: Receiver) -> Iterator[GatewayThread]:
    with GatewayThread(gateway_settings, otlp_endpoint=receiver.url) as gateway:
        yield gateway


@pytest.fixture
def traced(traced_gateway: GatewayThread, receiver: Receiver, fake_engine: FakeEngine) -> Iterator[Traced]:
    with traced_gateway.client() as client:
        wait_until_ready(client)
        yield Traced(traced_gateway, receiver, client, fake_engine)


def test_a_request_is_one_trace_down_to_the_engine(traced: Traced) -> None:
    traced.client.put(f"/users/{USER}/profile", json={"items": [{"text": TEXT}]}).raise_for_status()
    answer, seen = traced.generate()
    [request] = traced.spans("POST /generate")
    assert (request.service, request.parent) == ("mta-gateway", "")
    assert request.attributes["mta.level"] == answer.json()["personalization"]["level"]
    assert request.attributes["mta.request"] == answer.headers["x-request-id"]
    within = traced.receiver.trace(request.trace_id)
    assert any(span.attributes.get("db.system") == "redis" for span in within)
    [call] = [span for span in within if span.name == "POST"]
    assert call.parent == request.id
    assert seen.headers["traceparent"].startswith(f"00-{request.trace_id}-{call.id}-")
    assert "baggage" not in seen.headers


def test_gateway_joins_client_trace_and_forwards_no_baggage(traced: Traced) -> None:
    traceparent = f"00-{CLIENTS_TRACE}-b7ad6b7169203331-0"
    _, seen = traced.generate(traceparent=f"{traceparent}1", baggage="user=rosa")
    assert traced.spans("POST /generate")[-1].trace_id == CLIENTS_TRACE
    assert "baggage" not in seen.headers
    before = len(traced.spans())
    traced.generate(traceparent=f"{traceparent}0")  # the client traces, but not this request
    assert len(traced.spans()) == before


def test_looks_at_the_parts_are_no_traces(traced: Traced) -> None:
    for path in ("/health", "/ready", "/metrics", "/console"):
        traced.client.get(path)
    names = {span.name for span in traced.spans() if not span.parent}
    assert all(re.match(r"(GET|PUT|POST|DELETE) /(users|generate|jobs)", name) for name in names), names


def test_adapter_answer_is_linked_to_the_job_that_made_it(traced: Traced, work: Work) -> None:
    job = adapt(traced.client, USER, config={"steps": 6, "learning_rate": 0.05}).json()
    [request] = traced.spans("POST /users/{user_id}/adapt")
    work(tracing=traced.gateway.opened.tracing)
    assert job_of(traced.client, job)["state"] == "succeeded"
    traced.engine.knobs.user_adapters = True
    assert traced.generate()[0].json()["personalization"]["level"] == "stacked"
    [adapted] = traced.spans("adapt")
    assert (adapted.trace_id, adapted.parent) == (request.trace_id, request.id)
    assert adapted.attributes == {"mta.outcome": "succeeded", "mta.tries": 1}
    [train] = traced.spans("train")
    assert (train.trace_id, train.parent, train.attributes["mta.samples"]) == (adapted.trace_id, adapted.id, 8)
    assert traced.spans("POST /generate")[-1].links == (adapted.trace_id,)
    export = traced.client.get(f"/users/{USER}/export").raise_for_status().json()
    kept = export["jobs"][0]["traceparent"], export["adapter"]["traceparent"]
    assert [traceparent.split("-")[1] for traceparent in kept] == [adapted.trace_id] * 2


def test_nothing_of_a_user_is_in_what_is_sent(traced: Traced) -> None:
    client, url = traced.client, f"/users/{USER}"
    client.headers.update({"User-Agent": "rosas-browser", "Authorization": "Bearer rosas-key", "X-User-ID": USER})
    client.put(f"{url}/profile?note={USER}", json={"items": [{"text": TEXT}]}).raise_for_status()
    client.get(url).raise_for_status()
    client.get(f"/no/such/{USER}")
    client.post("/generate", json=BODY | {"prompt": {"text": PROMPT}})
    traced.engine.knobs.garbage = PROMPT.encode()
    client.post("/generate", json=BODY)
    client.delete(url).raise_for_status()
    spans, raw = traced.spans(), b"".join(traced.receiver.bodies)
    for secret in (USER, "rosa", TEXT, PROMPT, traced.gateway.key(USER), "mta3:", "redis.call"):
        assert secret.encode() not in raw, secret
    assert {span.name for span in spans} >= {"GET unmatched", "DELETE /users/{user_id}"}
    kept = {name for span in spans for name in span.attributes}
    ours = {f"mta.{name}" for name in ("request", "level", "outcome", "tries", "samples", "steps")}
    theirs = {"net.peer.name", "net.peer.port", "db.system", "error.type"}
    assert kept <= ours | theirs | {f"http.{name}" for name in ("method", "route", "status_code", "url")}


def test_a_silent_collector_holds_no_answer_up(
    gateway_settings: Settings, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.observability.otlp._EXPORT_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with GatewayThread(gateway_settings, otlp_endpoint=url) as gateway, gateway.client() as client:
            assert client.post("/generate", json=BODY).status_code == httpx.codes.OK


def test_only_a_share_of_requests_is_traced_where_one_is_set(receiver: Receiver) -> None:
    tracing: Any = open_tracing(Settings(otlp_endpoint=receiver.url, trace_share=0), "mta-test")
    try:
        with tracing.span("never"):
            assert int(tracing.current().rpartition("-")[2], 16) & SAMPLED == 0
    finally:
        tracing.close()
