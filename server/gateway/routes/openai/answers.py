"""Answers in OpenAI's shape: what the engine says, under public names, and beside it who spoke."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Literal

import orjson
from pydantic import BaseModel, Field

from server.gateway.generation.generator import Answer
from server.gateway.http.streaming import event
from server.gateway.routes.answers import PersonalizationAnswer
from server.gateway.routes.openai.requests import StreamOptions

_INTERNAL = ("kv_transfer_params", "ec_transfer_params")
"""What engines tell each other."""

_NULLABLE = {"content", "refusal", "logprobs", "finish_reason", "usage"}
"""What may be null in OpenAI's schema; whatever else is null there is not there at all."""

_PIECEWISE = frozenset(("index", "delta", "text", "logprobs"))


class _Completion(BaseModel, frozen=True):
    id: str
    created: int = Field(description="Seconds since 1970.")
    model: str = Field(description="As the request named it.")
    usage: dict[str, Any]
    personalization: PersonalizationAnswer = Field(description="Who spoke: beside OpenAI's own fields.")


class ChatCompletion(_Completion, frozen=True):
    """An answer to a conversation."""

    object: Literal["chat.completion"]
    choices: list[dict[str, Any]] = Field(
        description="OpenAI's: `index`, `message`, `finish_reason`, `logprobs`; of a stream `delta` for `message`."
    )


class TextCompletion(_Completion, frozen=True):
    """A continuation of a prompt."""

    object: Literal["text_completion"]
    choices: list[dict[str, Any]] = Field(description="OpenAI's: `index`, `text`, `finish_reason`, `logprobs`.")


class ModelAnswer(BaseModel, frozen=True):
    """A name that requests can call for."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(0, description="Not known.")
    owned_by: str = "mta"


class ModelsAnswer(BaseModel, frozen=True):
    """All names; recipes are none of them."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


class OpenAIFormat:
    """Writes answers of a `kind`, their `object` without a chunk's ending; `model` as the request named it."""

    def __init__(self, model: str, kind: str, options: StreamOptions) -> None:
        self._model = model
        self._kind = kind
        self._options = options

    async def whole(self, answer: Answer) -> bytes:
        values = [value async for _, value in answer.pieces()]
        value = values[0] if answer.stream.first_token_s is None else joined(values, self._kind)
        self._make_public(value, answer, self._kind)
        value["personalization"] = PersonalizationAnswer.of(answer).model_dump()
        return orjson.dumps(value)

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        kind = f"{self._kind}.chunk" if self._kind == "chat.completion" else self._kind
        begun = False
        async for _, chunk in answer.pieces():
            if not chunk["choices"] and not self._options.include_usage:
                continue
            self._make_public(chunk, answer, kind)
            if not self._options.include_usage:
                chunk.pop("usage", None)
            elif chunk["choices"] and not self._options.continuous_usage_stats:
                chunk["usage"] = None
            if not begun:
                chunk["personalization"] = PersonalizationAnswer.of(answer)
                begun = True
            yield event(chunk)

    def headers(self, answer: Answer) -> dict[str, str]:
        who = answer.personalization
        return {"X-MTA-Level": who.level.value} | ({"X-MTA-Recipe": who.shown} if who.shown else {})

    def _make_public(self, value: dict[str, Any], answer: Answer, kind: str) -> None:
        """Put public names for the engine's, of which the model's may hold a user's key."""
        value["id"], value["object"], value["model"] = answer.id, kind, self._model
        for name in _INTERNAL:
            value.pop(name, None)
        said = [choice.get("message") or choice.get("delta") or {} for choice in value["choices"]]
        for part in (value, value.get("usage") or {}, *value["choices"], *said):
            for name in [name for name, inner in part.items() if inner is None and name not in _NULLABLE]:
                del part[name]


def joined(chunks: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The answer that an engine would have given in one piece, out of all its chunks, the last with the usage.

    They are of one choice or several, in any order between the choices: its places in the engines came back one by one.
    """
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for piece in chunk["choices"]:
            if (choice := choices.get(piece["index"])) is None:
                said = {"message": {"role": "assistant", "content": "", "refusal": None}}
                choice = choices[piece["index"]] = {
                    "index": piece["index"],
                    **(said if "delta" in piece else {"text": ""}),
                    "logprobs": None,
                    "finish_reason": None,
                }
            _add(choice, piece)
    common = {name: value for name, value in chunks[0].items() if name != "choices"}
    ordered = [choices[index] for index in sorted(choices)]
    return common | {"object": kind, "choices": ordered, "usage": chunks[-1].get("usage")}


def _add(choice: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, said in piece.get("delta", {}).items():
        if isinstance(said, str) and name != "role":
            choice["message"][name] = (choice["message"].get(name) or "") + said
    if "text" in piece:
        choice["text"] += piece["text"]
    for name, values in (piece.get("logprobs") or {}).items():
        known = choice["logprobs"] = choice["logprobs"] or {}
        known[name] = [*(known.get(name) or ()), *values] if isinstance(values, list) else values
    choice |= {name: value for name, value in piece.items() if value is not None and name not in _PIECEWISE}
