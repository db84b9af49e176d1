"""Whatever is wrong with a request is answered in one shape, by name, before it touches anything."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, wait_until_ready
from tests.support.stored import held_by

USER = "somebody-known"
MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    """A request and what must be said about it.

    Attributes:
        param: the field that the error names; None where there is none.
        shown: what the message must contain: the value at fault, or its start.
    """

    name: str
    shown: str
    param: str | None
    body: Any = None
    raw: bytes | None = None
    method: str = "POST"
    path: str = "/generate"
    status: int = 400
    headers: tuple[tuple[str, str], ...] = (("Content-Type", "application/json"),)
    reaches_engine: bool = False


def gen(**fields: Any) -> dict[str, Any]:
    """A good generation with some fields replaced; `...` removes one."""
    body = {"user_id": USER, "prompt": "hello"} | fields
    return {name: value for name, value in body.items() if value is not ...}


def put(name: str, shown: str, param: str, items: Any) -> Case:
    return Case(name, shown, param, {"items": items}, method="PUT", path=f"/users/{USER}/profile")


def on_user(name: str, segment: str, shown: str, status: int = 400, param: str | None = "user_id") -> Case:
    body = {"items": [{"text": "x"}]}
    return Case(name, shown, param, body, method="PUT", path=f"/users/{segment}/profile", status=status)


CASES = [
    # Who
    Case("no user id", "user_id is required", "user_id", gen(user_id=...)),
    Case("null user id", "None", "user_id", gen(user_id=None)),
    Case("empty user id", "''", "user_id", gen(user_id="")),
    Case("number as user id", "7", "user_id", gen(user_id=7)),
    Case("user id with a slash", "a/b", "user_id", gen(user_id="a/b")),
    Case("user id of two dots", "'..'", "user_id", gen(user_id="..")),
    Case("user id with a newline", r"a\nb", "user_id", gen(user_id="a\nb")),
    Case("user id with a space", "'a b'", "user_id", gen(user_id="a b")),
    Case("user id with braces", "{a}", "user_id", gen(user_id="{a}")),
    Case("user id of 5,000 characters", "xxxx", "user_id", gen(user_id="x" * 5_000)),
    Case("user id of 10,000 characters", "xxxx", "user_id", gen(user_id="x" * 10_000)),
    Case("user id with a lone surrogate", r"\ud800", "user_id", raw=b'{"user_id": "a\\ud800", "prompt": "x"}'),
    Case("user id with NUL", r"a\x00", "user_id", raw=b'{"user_id": "a\\u0000", "prompt": "x"}'),
    # What
    Case("no prompt, no messages", "prompt or messages", "prompt", gen(prompt=...)),
    Case("prompt and messages", "not both", "prompt", gen(messages=[{"role": "user", "content": "x"}])),
    Case("empty prompt", "''", "prompt", gen(prompt="")),
    Case("prompt of 1 MiB", str(MIB), "prompt", gen(prompt="x" * MIB)),
    Case("prompt with NUL", r"a\x00b", "prompt", raw=b'{"user_id": "u", "prompt": "a\\u0000b"}'),
    Case("prompt with a lone surrogate", r"\udc00", "prompt", raw=b'{"user_id": "u", "prompt": "\\udc00"}'),
    Case("list as prompt", "['x']", "prompt", gen(prompt=["x"])),
    Case("no message", "[]", "messages", gen(prompt=..., messages=[])),
    Case("message of nobody", "is required", "messages.0.role", gen(prompt=..., messages=[{"content": "x"}])),
    Case("unknown role", "'robot'", "messages.0.role", gen(prompt=..., messages=[{"role": "robot", "content": "x"}])),
    Case("empty message", "''", "messages.0.content", gen(prompt=..., messages=[{"role": "user", "content": ""}])),
    Case(
        "messages of 1 MiB",
        str(MIB),
        "messages",
        gen(prompt=..., messages=[{"role": "user", "content": "x" * (MIB // 2)}] * 2),
    ),
    # How
    Case("max_tokens of a billion", "1000000000", "max_tokens", gen(max_tokens=10**9)),
    Case("max_tokens of the whole context", "512", "max_tokens", gen(max_tokens=512)),
    Case("max_tokens beyond 64 bits", "100000", "max_tokens", gen(max_tokens=10**30)),
    Case("max_tokens of zero", "0", "max_tokens", gen(max_tokens=0)),
    Case("negative max_tokens", "-1", "max_tokens", gen(max_tokens=-1)),
    Case("boolean max_tokens", "True", "max_tokens", gen(max_tokens=True)),
    Case("fractional max_tokens", "1.5", "max_tokens", gen(max_tokens=1.5)),
    Case("negative temperature", "-0.5", "temperature", gen(temperature=-0.5)),
    Case("temperature of NaN", "nan", "temperature", raw=b'{"user_id": "u", "prompt": "x", "temperature": NaN}'),
    Case("infinite temperature", "inf", "temperature", raw=b'{"user_id": "u", "prompt": "x", "temperature": 1e999}'),
    Case("text as temperature", "'hot'", "temperature", gen(temperature="hot")),
    Case("negative top_p", "-1", "top_p", gen(top_p=-1)),
    Case("top_p above one", "1.1", "top_p", gen(top_p=1.1)),
    Case("infinite top_p", "-inf", "top_p", raw=b'{"user_id": "u", "prompt": "x", "top_p": -Infinity}'),
    Case("seed beyond 64 bits", str(1 << 64), "seed", gen(seed=1 << 64)),
    Case("empty stop", "''", "stop.0", gen(stop="")),
    Case("number as stop", "3", "stop", gen(stop=3)),
    Case("text as stream", "'yes'", "stream", gen(stream="yes")),
    Case("unknown level", "'stacked'", "personalize", gen(personalize="stacked")),
    Case("unknown field", "'model'", "model", gen(model="gpt")),
    # Profiles
    put("no items", "[]", "items", []),
    put("items that are no list", "'x'", "items", "x"),
    put("item that is no object", "'x'", "items.0", ["x"]),
    put("item without text", "'date'", "items.1.text", [{"text": "x"}, {"date": "today"}]),
    put("item with blank text", "' '", "items.0.text", [{"text": " "}]),
    put("item with an object as text", "{'a': 1}", "items.0.text", [{"text": {"a": 1}}]),
    put("item with input alone", "'q'", "items.0.output", [{"input": "q"}]),
    put("item with an empty id", "''", "items.0.id", [{"id": "", "text": "x"}]),
    put("item with an id too long", "xxxx", "items.0.id", [{"id": "x" * 300, "text": "x"}]),
    put("item of 100 kB", "xxxx", "items.0", [{"text": "x" * 100_000}]),
    put("10,001 items", "10001", "items", [{"text": "x"}] * 10_001),
    Case("profile without items", "items is required", "items", {}, method="PUT", path=f"/users/{USER}/profile"),
    Case(
        "profile with an unknown field",
        "'task'",
        "task",
        {"items": [{"text": "x"}], "task": "no such task"},
        method="PUT",
        path=f"/users/{USER}/profile",
    ),
    Case(
        "item with NUL",
        r"\x00",
        "items.0.text",
        raw=b'{"items": [{"text": "\\u0000"}]}',
        path=f"/users/{USER}/profile/items",
    ),
    # Ids in paths
    on_user("encoded slash in the path", "a%2Fb", "/users/a/b", 404, None),
    on_user("two dots in the path", "..", "'..'"),
    on_user("encoded dots in the path", "%2e%2e", "'..'"),
    on_user("newline in the path", "a%0Ab", r"a\nb"),
    on_user("NUL in the path", "a%00b", r"a\x00b"),
    on_user("bytes that are no UTF-8 in the path", "a%FFb", "a�b"),
    on_user("10,000 characters in the path", "x" * 10_000, "xxxx"),
    on_user("nobody in the path", "", "/users//profile", 404, None),
    Case("unknown user is read", "'nobody'", "user_id", method="GET", path="/users/nobody", status=404),
    Case("unknown user is erased", "'nobody'", "user_id", method="DELETE", path="/users/nobody", status=404),
    # Bodies and routes
    Case("broken JSON", "{oops", "body", raw=b'{"user_id": {oops'),
    Case("no body", "empty", "body", raw=b""),
    Case("a body that is no object", "[1, 2]", "body", [1, 2]),
    Case("a body nested too deep", "[[[[", "body", raw=b"[" * 100_000),
    Case("a body that is no UTF-8", r"\xff", "body", raw=b'{"user_id": "\xff"}'),
    Case("a body too large", str(9 * MIB), "body", raw=b" " * (9 * MIB), status=413),
    Case(
        "another content type",
        "'text/plain'",
        "content-type",
        gen(),
        status=415,
        headers=(("Content-Type", "text/plain"),),
    ),
    Case("no content type", "None", "content-type", gen(), status=415, headers=()),
    Case("unknown route", "/v2/generate", None, gen(), path="/v2/generate", status=404),
    Case("route with a slash too many", "/generate/", None, gen(), path="/generate/", status=404),
    Case("wrong method", "GET '/generate'", None, method="GET", status=405),
    # The one thing only the engine can tell
    Case("a prompt beyond the context", "512", "prompt", gen(prompt="x" * 600), reaches_engine=True),
]


@pytest.fixture(scope="module", autouse=True)
def known_user(gateway: GatewayThread) -> Iterator[None]:
    """Somebody whose profile the bad requests must not touch."""
    with gateway.client() as client:
        client.put(f"/users/{USER}/profile", json={"items": [{"text": "the sea"}]}).raise_for_status()
        wait_until_ready(client)  # it knows the engine's context from then on
    yield


@pytest.mark.usefixtures("free_event_loop")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_by_name_and_touches_nothing(
    case: Case, gateway: GatewayThread, fake_engine: FakeEngine, gateway_settings: Settings
) -> None:
    before = held(gateway_settings)
    status, answer = send(gateway, case)
    assert status == case.status
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == case.param
    assert case.shown in error["message"]
    assert len(error["message"]) < 600
    assert len(fake_engine.seen) == case.reaches_engine
    assert held(gateway_settings) == before


def test_there_are_enough_cases_and_none_twice() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 35


@pytest.mark.usefixtures("free_event_loop")
def test_a_body_that_never_says_its_length_is_cut_off_at_the_limit(gateway: GatewayThread) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(64):
            yield b" " * MIB

    with gateway.client() as client:
        response = client.post("/generate", content=endless(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_a_wrong_method_says_which_are_right(gateway: GatewayThread) -> None:
    with gateway.client() as client:
        assert client.get("/generate").headers["Allow"] == "POST"


def send(gateway: GatewayThread, case: Case) -> tuple[int, Any]:
    """Send a case as it is: unlike other clients this one does not tidy up paths."""
    body = case.raw if case.raw is not None else None if case.body is None else json.dumps(case.body).encode()
    connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    try:
        connection.request(case.method, case.path, body, dict(case.headers))
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def held(settings: Settings) -> dict[str, str]:
    """What the store holds, but for the word that somebody was to be erased, which stays whoever that was."""
    found = held_by(settings.redis_url)
    return {
        name: it for name, it in found.items() if not name.startswith("mta:{rewrite}") and not name.endswith(":epoch")
    }
