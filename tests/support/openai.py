"""Calls of the routes that generate, above all OpenAI's, and how to read what comes back."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.support.gateway import generate

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
BOTH = pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
ALL = pytest.mark.parametrize("route", ["/generate", "/v1/chat/completions", "/v1/completions"])


def ask(
    client: httpx.Client, user: str | None = None, *, headers: dict[str, Any] | None = None, **fields: Any
) -> httpx.Response:
    """A short answer to a conversation."""
    body = HELLO | ({"user": user} if user else {}) | fields
    return client.post("/v1/chat/completions", json=body, headers=headers)


def either(client: httpx.Client, route: str, **fields: Any) -> httpx.Response:
    """A short answer of one of the routes."""
    if route == "/generate":
        return generate(client, fields.pop("user", "nobody"), **fields)
    said = HELLO if "chat" in route else {"prompt": "hello", "max_tokens": 4}
    return client.post(route, json=said | fields)


def text_of(chunks: list[Any], index: int = 0) -> str:
    """The text of one choice of a stream."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)


def error_of(response: httpx.Response) -> tuple[int, str, str]:
    """Status, field and code of an error."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["param"], error["code"]


def metric(client: httpx.Client, name: str) -> float:
    """A metric of a gateway, summed over its labels."""
    lines = client.get("/metrics").text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))
