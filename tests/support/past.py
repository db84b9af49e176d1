"""A person's past items, and what becomes of them in the prompt that the engine is sent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import httpx

from tests.support.fake_engine import FakeEngine

TURN = "what about the harbour?"


def pair(name: str, question: str, answer: str) -> dict[str, str]:
    return {"id": name, "input": question, "output": answer}


ITEMS = [
    pair("bread", "how is the bread?", "crusty"),
    pair("harbour", "where is the harbour?", "behind the mill"),
    pair("roses", "and the roses?", "in bloom"),
]


def put(client: httpx.Client, user_id: str, items: Sequence[dict[str, str]]) -> dict[str, Any]:
    answer = client.put(f"/users/{user_id}/profile", json={"items": list(items)}).raise_for_status().json()
    assert isinstance(answer, dict)
    return answer


def asked(fake_engine: FakeEngine) -> str:
    """The last turn that the engine was sent."""
    turn: str = fake_engine.seen[-1].body["messages"][-1]["content"]
    return turn
