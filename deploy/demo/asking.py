"""One question to the demo's server, and what the demo's table shows of the answer."""

from __future__ import annotations

import time
from dataclasses import dataclass

from mta_client import Client, Personalization

MAX_TOKENS = 80


@dataclass(frozen=True, slots=True)
class Answer:
    """What one user was told."""

    text: str  # the answer
    cut: bool  # whether it ran into the token limit
    level: str  # `base`, `merged` or `stacked`
    anchors: tuple[tuple[str, float], ...]  # (id, weight) of those merged for it, nearest first
    ttft_ms: float  # from sending the request to its first token


def ask(client: Client, user_id: str, question: str, max_tokens: int = MAX_TOKENS) -> Answer:
    """One greedy, streamed answer."""
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
