"""The chunks of a streamed answer, in OpenAI's shape. Plain dictionaries: one is made for every token."""

from __future__ import annotations

import time
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from server.engine_protocol import BASE_MODEL
from server.gateway.generation.generator import Answer
from server.gateway.routes.answers import PersonalizationAnswer, Usage, personalization_answer, usage_answer


class Delta(TypedDict, total=False):
    """What a chunk adds."""

    role: Literal["assistant"]
    content: str


class Choice(TypedDict):
    """The only choice."""

    index: int
    delta: Delta
    finish_reason: str | None


class Chunk(TypedDict):
    """A piece of an answer. The first has `personalization`, the last `usage` and `timings_ms`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[Choice]
    personalization: NotRequired[PersonalizationAnswer]
    usage: NotRequired[Usage | None]
    timings_ms: NotRequired[dict[str, float]]


class Chunks:
    """The chunks of one stream."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._created = int(time.time())
        self._model = answer.personalization.shown or BASE_MODEL

    def first(self) -> Chunk:
        """Says who speaks, before the first text."""
        chunk = self._chunk({"role": "assistant", "content": ""})
        chunk["personalization"] = personalization_answer(self._answer)
        return chunk

    def text(self, text: str) -> Chunk:
        """A piece of text."""
        return self._chunk({"content": text})

    def last(self) -> Chunk:
        """Ends the answer: reason, usage, and all timings."""
        chunk = self._chunk({}, self._answer.stream.finish_reason)
        chunk["usage"] = usage_answer(self._answer.stream)
        chunk["timings_ms"] = self._answer.timings.ms
        return chunk

    def _chunk(self, delta: Delta, finish_reason: str | None = None) -> Chunk:
        return {
            "id": self._answer.id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": self._model,
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
        }
