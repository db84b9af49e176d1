"""Calls that many tests make of a gateway, and of commands; and what came back or reached the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from server.cli import app
from tests.support.fake_engine import FakeEngine

NewUser = Callable[[], str]
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
BOTH = pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
ALL = pytest.mark.parametrize("route", ["/generate", "/v1/chat/completions", "/v1/completions"])
TRANSLATED = pytest.mark.parametrize("route", ["/v1/responses", "/v1/messages"])
SAMPLES = [{"input": f"question {n}", "output": f"{n} yes yes yes"} for n in range(8)]


def pair(name: str, question: str, answer: str) -> dict[str, str]:
    return {"id": name, "input": question, "output": answer}


TURN = "what about the harbour?"
ITEMS = [
    pair("bread", "how is the bread?", "crusty"),
    pair("harbour", "where is the harbour?", "behind the mill"),
    pair("roses", "and the roses?", "in bloom"),
]


def mta(*arguments: object, **environment: str) -> str:
    """What a command prints; raises its error."""
    done = CliRunner().invoke(app, list(map(str, arguments)), env=environment)
    if done.exit_code:
        raise done.exception or AssertionError(done.output)
    return done.output


def put(client: httpx.Client, user_id: str, items: Sequence[dict[str, Any]] = ITEMS) -> dict[str, Any]:
    return client.put(f"/users/{user_id}/profile", json={"items": list(items)}).raise_for_status().json()


def adapt(client: httpx.Client, user_id: str, **fields: Any) -> httpx.Response:
    return client.post(f"/users/{user_id}/adapt", json={"samples": SAMPLES} | fields)


FINAL = {"input": "any plans?", "text": "I have no plans.", "final": "The sea. Always the sea."}


def give(client: httpx.Client, user_id: str, answer: str, **feedback: Any) -> httpx.Response:
    return client.post(f"/users/{user_id}/feedback", json={"answer": answer, **feedback})


def job_of(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    return client.get(f"/jobs/{job['id']}").raise_for_status().json()


def who(response: httpx.Response) -> dict[str, Any]:
    """The personalization of an answer."""
    return response.raise_for_status().json()["personalization"]


def ask(
    client: httpx.Client, user: str | None = None, *, headers: dict[str, Any] | None = None, **fields: Any
) -> httpx.Response:
    body = HELLO | ({"user": user} if user else {}) | fields
    return client.post("/v1/chat/completions", json=body, headers=headers)


def body_of(route: str, **fields: Any) -> dict[str, Any]:
    """A short generation for a route."""
    named = {"user_id": fields.pop("user", "nobody")} if route == "/generate" else {}
    if "responses" in route:
        return {"input": "hello", "max_output_tokens": 4} | fields
    is_chat = "chat" in route or "messages" in route
    return named | (HELLO if is_chat else {"prompt": "hello", "max_tokens": 4}) | fields


def either(client: httpx.Client, route: str, **fields: Any) -> httpx.Response:
    return client.post(route, json=body_of(route, **fields))


def asked(fake_engine: FakeEngine) -> str:
    """The last turn of the last conversation that the engine got."""
    return fake_engine.seen[-1].body["messages"][-1]["content"]


def error_of(response: httpx.Response) -> tuple[int, str | None, str]:
    """Status, field and code of an error; Anthropic's names no field."""
    error = response.json()["error"]
    if "details" in error:
        return response.status_code, None, error["details"]["error_code"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["param"], error["code"]
