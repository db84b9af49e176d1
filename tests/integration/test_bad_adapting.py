"""Whatever is wrong with samples or jobs is answered by name, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from server.settings import Settings
from tests.support.gateway import GatewayThread, wait_until_ready
from tests.support.stored import held_by

pytestmark = pytest.mark.usefixtures("free_event_loop")

GOOD = {"input": "q", "output": "a"}
JSON, LINES = "application/json", "application/x-ndjson"


@dataclass(frozen=True)
class Case:
    """A request and what must be said about it; see `test_bad_input.Case`."""

    name: str
    shown: str
    param: str | None
    body: Any = None
    raw: bytes | None = None
    status: int = 400
    media: str = JSON


def samples(name: str, shown: str, param: str, *given: Any, **more: Any) -> Case:
    return Case(name, shown, param, {"samples": list(given), **more})


def config(name: str, shown: str, field: str, **given: Any) -> Case:
    return Case(name, shown, f"config.{field}", {"samples": [GOOD], "config": given})


CASES = [
    samples("no samples", "[]", "samples"),
    Case("samples missing", "samples is required", "samples", {}),
    Case("samples that are no list", "'x'", "samples", {"samples": "x"}),
    Case("1,001 samples", "1001", "samples", {"samples": [GOOD] * 1001}),
    samples("sample that is no object", "'x'", "samples.0", "x"),
    samples("empty output", "''", "samples.1.output", GOOD, {"input": "q", "output": ""}),
    samples("blank output", "' '", "samples.0.output", {"input": "q", "output": " "}),
    samples("blank input", "'\\n'", "samples.0.input", {"input": "\n", "output": "a"}),
    samples("output missing", "is required", "samples.0.output", {"input": "q"}),
    samples("number as output", "7", "samples.0.output", {"input": "q", "output": 7}),
    samples("input missing", "is required", "samples.0.input", {"output": "a"}),
    samples("empty input", "''", "samples.0.input", {"input": "", "output": "a"}),
    samples("number as input", "7", "samples.0.input", {"input": 7, "output": "a"}),
    samples("no message", "[]", "samples.0.input", {"input": [], "output": "a"}),
    samples(
        "conversation that ends with the assistant",
        "'assistant'",
        "samples.0.input",
        {"input": [{"role": "assistant", "content": "x"}], "output": "a"},
    ),
    samples("unknown field of a sample", "weight'", "samples.0.weight", GOOD | {"weight": 2}),
    samples("sample beyond the context", "601 tokens", "samples.0", {"input": "x" * 600, "output": "y"}),
    samples("sample of 100 KB", "100", "samples.0", {"input": "q", "output": "x" * 100_000}),
    Case("body of 10 MB", "10", "body", {"samples": [{"input": "q", "output": "x" * 10_000_000}]}, status=413),
    Case("binary", "not UTF-8", "body", raw=bytes(range(256))),
    Case("sample with NUL", r"a\x00", "samples.0.output", raw=b'{"samples": [{"input": "q", "output": "a\\u0000"}]}'),
    Case("wrong content type", "text/plain", "content-type", raw=b"x", status=415, media="text/plain"),
    samples("unknown field", "'epochs'", "epochs", GOOD, epochs=3),
    samples("text as append", "'yes'", "append", GOOD, append="yes"),
    samples("empty idempotency key", "''", "idempotency_key", GOOD, idempotency_key=""),
    samples("long idempotency key", "xxx", "idempotency_key", GOOD, idempotency_key="x" * 129),
    config("unknown kind", "'dora'", "kind", kind="dora"),
    config("rank of zero", "0", "rank", kind="lora", rank=0),
    config("rank of nine", "9", "rank", kind="lora", rank=9),
    config("rank of a core", "makes no sense", "rank", kind="core", rank=2),
    config("rank beyond the bank's room", "leaves", "rank", kind="lora", rank=8),
    config("no steps", "0", "steps", steps=0),
    config("a million steps", "1000000", "steps", steps=1_000_000),
    config("negative learning rate", "-1", "learning_rate", learning_rate=-1),
    config("holdout of everything", "1", "holdout", holdout=1),
    config("strength beyond the merged adapter's", "1.5", "strength", strength=1.5),
    config("unknown option", "optimizer'", "optimizer", optimizer="sgd"),
    Case("line that is no JSON", "samples.1", "samples.1", raw=b'{"input":"q","output":"a"}\n{', media=LINES),
    Case(
        "line without output",
        "is required",
        "samples.1.output",
        raw=b'{"input":"q","output":"a"}\n{"input":"q"}\n',
        media=LINES,
    ),
    Case("no line", "[]", "samples", raw=b"\n\n", media=LINES),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_is_refused_by_name_and_changes_nothing(
    client: httpx.Client, new_user: Callable[[], str], gateway_settings: Settings, case: Case
) -> None:
    wait_until_ready(client)  # the engine's context of 512 is known from here on
    before = held_by(gateway_settings.redis_url)
    content = case.raw if case.raw is not None else json.dumps(case.body).encode()
    response = client.post(f"/users/{new_user()}/adapt", content=content, headers={"Content-Type": case.media})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (case.status, case.param), error
    assert case.shown in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert held_by(gateway_settings.redis_url) == before


def test_samples_come_as_lines_too(client: httpx.Client, new_user: Callable[[], str], gateway: GatewayThread) -> None:
    user_id = new_user()
    content = b'{"input": "q1", "output": "a1"}\n\n{"input": "q2", "output": "a2"}\n'
    response = client.post(f"/users/{user_id}/adapt", content=content, headers={"Content-Type": LINES})
    assert response.status_code == 202
    assert client.get(f"/users/{user_id}").json()["items"] == 2


@pytest.mark.parametrize("job_id", ["unknown", "a.1", "a.0x1", "%00", "a" * 65, "%2E%2E", f"{'a' * 26}.1"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_a_job_that_is_none_is_a_404_or_refused(client: httpx.Client, method: str, job_id: str) -> None:
    response = client.request(method, f"/jobs/{job_id}")
    assert response.status_code in (400, 404)
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_appending_beyond_a_thousand_is_refused_and_keeps_what_there_is(
    client: httpx.Client, new_user: Callable[[], str]
) -> None:
    user_id = new_user()
    samples = [{"input": "which?", "output": f"the {n}th"} for n in range(1001)]
    client.post(f"/users/{user_id}/adapt", json={"samples": samples[:999]}).raise_for_status()
    response = client.post(f"/users/{user_id}/adapt", json={"samples": samples[999:], "append": True})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "too_many_samples")
