"""Ask the demo's server a question, and keep the parts of the answer that the table shows."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mta_client import Client, Personalization

MAX_TOKENS = 80


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer to one user."""

    text: str  # the answer's text
    cut: bool  # whether it reached the token limit
    level: str  # `base`, `merged` or `stacked`
    anchors: tuple[tuple[str, float | None], ...]  # (id, weight) of the merged anchors, nearest first
    ttft_ms: float  # time to the first token


def ask(client: Client, user_id: str, question: str, max_tokens: int = MAX_TOKENS) -> Answer:
    """Request one greedy, streamed answer."""
    sent_s = time.perf_counter()
    first_token_s = finish_reason = None
    pieces: list[str] = []
    who: Personalization | None = None
    for chunk in client.stream(user_id, question, max_tokens=max_tokens, temperature=0):
        who, finish_reason = chunk.personalization or who, chunk.finish_reason
        if chunk.text:
            first_token_s = first_token_s or time.perf_counter()
            pieces.append(chunk.text)
    ttft_ms = ((first_token_s or time.perf_counter()) - sent_s) * 1000
    assert who is not None  # every stream begins with it
    anchors = tuple((anchor.id, anchor.weight) for anchor in who.anchors)
    return Answer("".join(pieces).strip(), finish_reason == "length", who.level, anchors, ttft_ms)
