"""Every invalid request is refused in the same shape, with the field's name, before it changes anything."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from httpx import Client, Response

from bench.rig.valkey import ValkeyProcess
from server.settings import Settings
from tests.support.calls import NewUser, adapt, error_of, put
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, wait_until_ready
from tests.support.store_parts import held_by

USER = "somebody-known"
MIB = 1 << 20
JSON, LINES = "application/json", "application/x-ndjson"
GOOD = {"input": "q", "output": "a"}


@dataclass(frozen=True)
class Case:
    """A request and its refusal."""

    name: str
    shown: str  # in the message: the invalid value, or its start
    param: str | None
    sent: Any = None  # the body, as bytes or as a JSON value
    call: str = "POST /generate"
    status: int = 400
    media: str | None = JSON
    reaches_engine: bool = False


def gen(name: str, shown: str, param: str, **fields: Any) -> Case:
    """A valid generation with some fields replaced; `...` removes one."""
    body = {"user_id": USER, "prompt": "hello"} | fields
    return Case(name, shown, param, {name: value for name, value in body.items() if value is not ...})


def said(name: str, shown: str, param: str, *messages: Any) -> Case:
    return gen(name, shown, param, prompt=..., messages=list(messages))


def profile(name: str, shown: str, param: str, items: Any, **more: Any) -> Case:
    return Case(name, shown, param, {"items": items, **more}, f"PUT /users/{USER}/profile")


def on_user(name: str, segment: str, shown: str, status: int = 400, param: str | None = "user_id") -> Case:
    return Case(name, shown, param, {"items": [{"text": "x"}]}, f"PUT /users/{segment}/profile", status)


def adapt_case(name: str, shown: str, param: str, sent: Any, **more: Any) -> Case:
    return Case(name, shown, param, sent, "POST /users/nobody-yet/adapt", **more)


def samples_case(name: str, shown: str, param: str, *given: Any, **more: Any) -> Case:
    return adapt_case(name, shown, param, {"samples": list(given), **more})


def config(name: str, shown: str, field: str, **given: Any) -> Case:
    return samples_case(name, shown, f"config.{field}", GOOD, config=given)


CASES = [
    # Who
    gen("no user id", "user_id is required", "user_id", user_id=...),
    gen("empty user id", "''", "user_id", user_id=""),
    # What
    gen("no prompt, no messages", "prompt or messages", "prompt", prompt=...),
    gen("empty prompt", "''", "prompt", prompt=""),
    said("no message", "[]", "messages"),
    said("message of nobody", "is required", "messages.0.role", {"content": "x"}),
    said("empty message", "''", "messages.0.content", {"role": "user", "content": ""}),
    # How
    gen("max_tokens of a billion", "1000000000", "max_tokens", max_tokens=10**9),
    gen("max_tokens beyond 64 bits", "100000", "max_tokens", max_tokens=10**30),
    # Profiles
    profile("no items", "[]", "items", []),
    profile("item without text", "'date'", "items.1.text", [{"text": "x"}, {"date": "today"}]),
    profile("10,001 items", "10001", "items", [{"text": "x"}] * 10_001),
    profile("profile with an unknown field", "'task'", "task", [{"text": "x"}], task="no such task"),
    Case("profile without items", "items is required", "items", {}, f"PUT /users/{USER}/profile"),
    # Samples and how to train on them
    samples_case("no samples", "[]", "samples"),
    adapt_case("samples missing", "samples is required", "samples", {}),
    adapt_case("1,001 samples", "1001", "samples", {"samples": [GOOD] * 1001}),
    samples_case("empty output", "''", "samples.1.output", GOOD, {"input": "q", "output": ""}),
    samples_case("blank input", "'\\n'", "samples.0.input", {"input": "\n", "output": "a"}),
    samples_case("empty input", "''", "samples.0.input", {"input": "", "output": "a"}),
    samples_case("no turn", "[]", "samples.0.input", {"input": [], "output": "a"}),
    samples_case(
        "no user's turn", "'assistant'", "samples.0.input", GOOD | {"input": [{"role": "assistant", "content": "x"}]}
    ),
    samples_case("unknown field of a sample", "weight'", "samples.0.weight", GOOD | {"weight": 2}),
    samples_case("sample beyond the context", "601 tokens", "samples.0", {"input": "x" * 600, "output": "y"}),
    samples_case("unknown field beside samples", "'epochs'", "epochs", GOOD, epochs=3),
    samples_case("empty idempotency key", "''", "idempotency_key", GOOD, idempotency_key=""),
    samples_case("long idempotency key", "xxx", "idempotency_key", GOOD, idempotency_key="x" * 129),
    adapt_case("samples as text", "text/plain", "content-type", b"x", status=415, media="text/plain"),
    adapt_case("line that is no JSON", "samples.1", "samples.1", b'{"input":"q","output":"a"}\n{', media=LINES),
    adapt_case("no line", "[]", "samples", b"\n\n", media=LINES),
    config("rank of nine", "9", "rank", rank=9),
    config("rank beyond the bank's room", "leaves", "rank", rank=8),
    config("strength beyond the merged adapter's", "1.5", "strength", strength=1.5),
    config("unknown option", "optimizer'", "optimizer", optimizer="sgd"),
    # Ids in paths
    on_user("encoded slash in the path", "a%2Fb", "/users/a/b", 404, None),
    on_user("two dots in the path", "..", "'..'"),
    on_user("newline in the path", "a%0Ab", r"a\nb"),
    on_user("NUL in the path", "a%00b", r"a\x00b"),
    on_user("bytes that are no UTF-8 in the path", "a%FFb", "a�b"),
    on_user("10,000 characters in the path", "x" * 10_000, "xxxx"),
    on_user("nobody in the path", "", "/users//profile", 404, None),
    Case("unknown user is read", "'nobody'", "user_id", None, "GET /users/nobody", 404),
    Case("unknown user is erased", "'nobody'", "user_id", None, "DELETE /users/nobody", 404),
    # Bodies and routes
    Case("broken JSON", "{oops", "body", b'{"user_id": {oops'),
    Case("a body that is no object", "[1, 2]", "body", [1, 2]),
    Case("a body too large", str(9 * MIB), "body", b" " * (9 * MIB), status=413),
    Case("another content type", "'text/plain'", "content-type", {}, status=415, media="text/plain"),
    Case("no content type", "None", "content-type", {}, status=415, media=None),
    Case("unknown route", "/v2/generate", None, {}, "POST /v2/generate", 404),
    Case("route with a slash too many", "/generate/", None, {}, "POST /generate/", 404),
    Case("wrong method", "GET '/generate'", None, None, "GET /generate", 405),
    # The one thing only the engine can tell
    replace(gen("a prompt beyond the context", "512", "prompt", prompt="x" * 600), reaches_engine=True),
]


@pytest.fixture(scope="module")
def untouched(gateway: GatewayThread) -> Callable[[Case], bool]:
    """Tells whether the store has changed since the last call; the mark of a write that has begun may stay."""
    with gateway.client() as client:
        put(client, USER, [{"text": "the sea"}])
        wait_until_ready(client)  # from now on the gateway knows the engine's context of 512
    last = held_by(gateway.opened.settings.redis_url)

    def unchanged(case: Case) -> bool:
        nonlocal last
        before, last = last, held_by(gateway.opened.settings.redis_url)
        changed = {key for key, _ in before.items() ^ last.items()}
        return all(key.endswith(":epoch") for key in changed)

    return unchanged


@pytest.mark.usefixtures("free_event_loop")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_by_name_and_touches_nothing(
    case: Case, gateway: GatewayThread, fake_engine: FakeEngine, untouched: Callable[[Case], bool]
) -> None:
    status, answer = send(gateway, case)
    assert (status, set(answer)) == (case.status, {"error"}), answer
    error = answer["error"]
    assert (set(error), error["param"]) == ({"message", "type", "param", "code"}, case.param)
    assert case.shown in error["message"]
    assert len(error["message"]) < 600
    assert len(fake_engine.seen) == case.reaches_engine
    assert untouched(case)


@pytest.mark.usefixtures("free_event_loop")
def test_body_without_a_length_is_cut_off_at_the_limit(client: Client) -> None:
    endless = (b" " * MIB for _ in range(64))
    response = client.post("/generate", content=endless, headers={"Content-Type": JSON})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_compressed_body_is_refused_as_such(client: Client) -> None:
    response = client.post("/generate", content=b"\x1f\x8b", headers={"Content-Type": JSON, "Content-Encoding": "gzip"})
    assert error_of(response) == (415, "content-encoding", "unsupported_media_type")
    assert "'gzip'" in response.json()["error"]["message"]


@pytest.mark.parametrize("job_id", ["unknown", "a.1", "a.0x1", "%00", "a" * 65, "%2E%2E", f"{'a' * 26}.1"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_unknown_job_is_refused(client: Client, method: str, job_id: str) -> None:
    assert error_of(client.request(method, f"/jobs/{job_id}"))[0] in (400, 404)


def test_samples_come_as_lines_and_never_too_many(
    client: Client, new_user: NewUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.gateway.users.adapting.MAX_SAMPLES", 10)
    user_id, given = new_user(), [{"input": "which?", "output": f"the {n}th"} for n in range(11)]
    url, lines = f"/users/{user_id}/adapt", "\n\n".join(map(json.dumps, given[:8]))
    assert client.post(url, content=lines, headers={"Content-Type": LINES}).status_code == 202
    assert client.get(f"/users/{user_id}").json()["items"] == 8
    client.post(url, json={"samples": given[8:10], "append": True}).raise_for_status()
    response = client.post(url, json={"samples": given[10:], "append": True})
    assert error_of(response) == (400, "samples", "too_many_samples")


def send(gateway: GatewayThread, case: Case) -> tuple[int, Any]:
    """Send a case with a client that does not normalise paths."""
    body = case.sent if case.sent is None or isinstance(case.sent, bytes) else json.dumps(case.sent).encode()
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    try:
        connection.request(*case.call.split(" "), body, {"Content-Type": case.media} if case.media else {})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def conversation(*roles: str) -> dict[str, Any]:
    return {"input": [{"role": role, "content": "hello"} for role in roles], "output": "a"}


def samples(count: int, output: str) -> list[dict[str, str]]:
    return [{"input": f"{n}", "output": output} for n in range(count)]


def with_steps(client: Client, user_id: str, steps: int, given: list[dict[str, str]], **fields: Any) -> Response:
    return adapt(client, user_id, samples=given, config={"steps": steps}, **fields)


@pytest.fixture(scope="module")
def small(gateway_settings: Settings, fake_engine_server: FakeEngine, store: ValkeyProcess) -> Iterator[GatewayThread]:
    """A gateway whose jobs may read few tokens; they are in a store of their own, since no worker trains them."""
    fake_engine_server.reset()
    with GatewayThread(gateway_settings, job_tokens=20_000, job_seconds=60, redis_url=store.url) as gateway:
        with gateway.client() as client:
            wait_until_ready(client)  # from now on it knows the engine's context of 512
        yield gateway


@pytest.fixture
def strict(small: GatewayThread, fake_engine: FakeEngine) -> Iterator[Client]:
    """A client of it; it has asked nothing yet, and the engine has a strict template."""
    fake_engine.knobs.strict = True
    small.parts.adapting.checks._accepted.clear()
    with small.client() as client:
        yield client


def test_template_refusals_make_no_job(strict: Client, new_user: NewUser) -> None:
    user_id, good = new_user(), [{"input": "q", "output": "a"}, conversation("system", "user")]
    response = adapt(strict, user_id, samples=[*good, conversation("user", "system", "user")])
    assert error_of(response) == (400, "samples.2.input", "refused_by_template")
    assert "the system message must come first" in response.json()["error"]["message"]
    assert strict.get(f"/users/{user_id}").status_code == 404  # nothing is stored


def test_each_sequence_of_roles_is_checked_once(strict: Client, new_user: NewUser, fake_engine: FakeEngine) -> None:
    talks = [conversation(*["user", "assistant"] * turns, "user") for turns in range(30)]
    for _ in range(2):
        response = adapt(strict, new_user(), samples=[*talks, *talks, conversation("user", "user")])
        assert error_of(response)[1] == "samples.60.input"
    assert len(fake_engine.tokenized) == 30 + 2
    assert fake_engine.tokenized[0] == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a"}]


def test_unchecked_samples_are_taken_once(strict: Client, new_user: NewUser, fake_engine: FakeEngine) -> None:
    for counts, status in ((False, 202), (True, 400)):
        fake_engine.knobs.counts = counts
        assert adapt(strict, new_user(), samples=[conversation("user", "user")]).status_code == status


def test_too_many_steps_are_refused_with_how_many_fit(strict: Client, new_user: NewUser) -> None:
    user_id, given = new_user(), samples(10, "x" * 99)
    response = with_steps(strict, user_id, 500, given)
    assert error_of(response) == (400, "config.steps", "job_too_large")
    message = response.json()["error"]["message"]
    # 3 runs of 500 steps of 4 samples, 250 + 5 looks at 10 of them, 100 each, and an answer shown twice
    assert "855264 tokens" in message
    assert "20000 are allowed" in message
    fitting = int(message.rpartition("with ")[2].partition(" steps")[0])
    assert with_steps(strict, user_id, fitting + 1, given).status_code == 400
    job = with_steps(strict, user_id, fitting, given).raise_for_status().json()
    assert (job["config"]["max_tokens"], job["config"]["max_seconds"]) == (20_000, 60)
    assert strict.get(f"/jobs/{job['id']}").json()["config"] == job["config"]
    response = adapt(strict, user_id, samples=samples(500, "x" * 500))  # a single step is too much
    assert error_of(response) == (400, "samples", "job_too_large")


def test_tokens_are_counted_if_needed(strict: Client, new_user: NewUser, fake_engine: FakeEngine) -> None:
    given = [{"input": "?", "output": "😀" * 30}] * 10  # four bytes, one token here
    with_steps(strict, new_user(), 16, given).raise_for_status()
    assert len(fake_engine.tokenized) == 11
    fake_engine.knobs.counts = False
    response = with_steps(strict, new_user(), 16, given)
    assert error_of(response) == (503, None, "engine_unavailable")
    assert "of 10 of 10 samples" in response.json()["error"]["message"]


def test_kept_samples_count_too(strict: Client, new_user: NewUser) -> None:
    user_id, more = new_user(), samples(4, "y" * 400)
    with_steps(strict, user_id, 2, samples(2, "x" * 400)).raise_for_status()
    assert error_of(with_steps(strict, user_id, 2, more, append=True))[1] == "config.steps"
    with_steps(strict, user_id, 1, more, append=True).raise_for_status()
    with_steps(strict, user_id, 2, more).raise_for_status()
