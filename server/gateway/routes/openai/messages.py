"""`POST /v1/messages`: Anthropic's Messages."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal, Self

import orjson
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from adapters.errors import excerpt
from server.errors import ApiError, InvalidRequest
from server.gateway.generation.generator import Answer
from server.gateway.http.bodies import JsonRoute
from server.gateway.http.streaming import event
from server.gateway.routes.answering import PersonalizationAnswer
from server.gateway.routes.openai.requests import STRING, Text, TranslatedRequest, object_schema, text_of, texts_schema
from server.gateway.routes.openai.routes import STREAMED, NamedAnswer, UserHeader, answer_to
from server.gateway.routes.openai.translation import (
    AnswerBlock,
    Kind,
    TranslatedResponse,
    Turn,
    conversation_of,
    tool_call,
)
from server.gateway.routes.requests import MAX_MESSAGES, QueueTimeout, Stops, Strict, UserId
from server.observability.logs import request_id
from server.settings import MAX_INT32

_ERRORS = {  # types by status
    **{401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"},
    **{429: "rate_limit_error", 503: "overloaded_error"},
}
_BLOCKS = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "tool_use", "thinking"),
    "system": ("text",),
}
_DELTAS = {
    Kind.TEXT: ("text_delta", "text"),
    Kind.REASONING: ("thinking_delta", "thinking"),
    Kind.CALL: ("input_json_delta", "partial_json"),
}
_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}


def _turns_of(message: Any) -> list[Turn]:
    """Convert a message: the results of tools become turns of their own, before what the user says about them."""
    match message:
        case {"role": "user" | "assistant" | "system" as role, "content": str() | list() as content}:
            blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
            turns = [_turn_of(role, block) for block in blocks]
            return conversation_of(sorted(turns, key=lambda turn: turn["role"] != "tool"))
    raise PydanticCustomError("message", "must have the role user, assistant or system, and content")


def _turn_of(role: str, block: Any) -> Turn:
    kind = block.get("type") if isinstance(block, dict) else None
    match block if kind in _BLOCKS[role] else None:
        case {"type": "text", "text": str(text)}:
            return {"role": role, "content": text}
        case {"type": "thinking", "thinking": str(text)}:
            return {"role": role, "content": "", "reasoning": text}
        case {"type": "tool_use", "id": str(call_id), "name": str(name), "input": dict(given)} if name:
            return tool_call(call_id, name, json.dumps(given, ensure_ascii=False))
        case {"type": "tool_result", "tool_use_id": str(call_id)}:
            content = text_of(block.get("content") or "", "text")
            return {"role": "tool", "tool_call_id": call_id, "content": content}
    raise PydanticCustomError(
        "block",
        "must have whole blocks of type {kinds}, not {kind}",
        {"kinds": ", ".join(_BLOCKS[role]), "kind": excerpt(kind or block)},
    )


def _tool_of(tool: Any) -> dict[str, Any]:
    match tool:
        case {"name": str(name), "input_schema": dict(schema)} if tool.get("type") in (None, "custom"):
            more = {field: tool[field] for field in ("description", "strict") if tool.get(field) is not None}
            return {"type": "function", "function": {"name": name, "parameters": schema, **more}}
    raise PydanticCustomError("tool", "must be of type custom, with a name and an input_schema: no other is run here")


_NAME = {"type": "string", "minLength": 1}
_OBJECT = {"type": "object"}
_BLOCK = {
    "anyOf": [
        object_schema({"type": {"const": "text"}, "text": STRING}),
        object_schema({"type": {"const": "thinking"}, "thinking": STRING}),
        object_schema({"type": {"const": "tool_use"}, "id": STRING, "name": _NAME, "input": _OBJECT}),
        object_schema({"type": {"const": "tool_result"}, "tool_use_id": STRING}, content=texts_schema("text")),
    ]
}
_CONTENT = {"anyOf": [STRING, {"type": "array", "items": _BLOCK}]}
_MESSAGE = object_schema({"role": {"enum": list(_BLOCKS)}, "content": _CONTENT})
_TOOL = object_schema({"name": _NAME, "input_schema": _OBJECT}, type={"const": "custom"})


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: str = Field("", description="Of the tool, with the type `tool`.")
    disable_parallel_tool_use: bool = False


class Metadata(Strict):
    user_id: UserId | None = Field(None, description="User id, if `user` is not set.")


class MessagesRequest(TranslatedRequest):
    ID_PREFIX = "msg"
    PROMPT = "messages"
    HINTS = frozenset(("cache_control", "service_tier", "speed", "thinking"))
    RENAMED: ClassVar = {".function.parameters": ".input_schema", ".function": ""}

    max_tokens: int = Field(ge=1, le=MAX_INT32, description="Refused beyond the context.")
    messages: list[Annotated[Any, PlainValidator(_turns_of), WithJsonSchema(_MESSAGE)]] = Field(
        fail_fast=True, min_length=1, max_length=MAX_MESSAGES, description="They end with a turn of the user."
    )
    system: Text | None = None
    stop_sequences: Stops | None = None
    tools: list[Annotated[Any, PlainValidator(_tool_of), WithJsonSchema(_TOOL)]] | None = None
    tool_choice: ToolChoice | None = None
    metadata: Metadata = Metadata()

    def chat_fields(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = conversation_of(chain(system, *self.messages))
        if messages and messages[-1]["role"] == "assistant":
            raise InvalidRequest("messages must end with a turn of the user: no answer is continued", param="messages")
        choice = self.tool_choice or ToolChoice(type="auto")
        function = {"type": "function", "function": {"name": choice.name}}
        return {
            "user": self.user or self.metadata.user_id,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "tools": self.tools or None,
            "tool_choice": {"auto": None, "any": "required", "tool": function, "none": "none"}[choice.type],
            "parallel_tool_calls": False if choice.disable_parallel_tool_use else None,
        }


class MessagesError(BaseModel, frozen=True):
    """Anthropic's error shape, used by every 4xx and 5xx response of `/v1/messages`."""

    type: Literal["error"] = "error"
    error: dict[str, Any] = Field(description="`type`, `message`, and the code as `details.error_code`.")
    request_id: str

    @classmethod
    def of(cls, error: ApiError) -> Self:
        kind = _ERRORS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
        told = {"type": kind, "message": error.message, "details": {"error_code": error.code}}
        return cls(error=told, request_id=request_id.get())


class MessagesRoute(JsonRoute):
    """A route whose errors have another shape, and whose key may come in another header."""

    error_answer = MessagesError.of
    key_header = b"x-api-key"


_FAILED: dict[int | str, dict[str, Any]] = {"4XX": {"model": MessagesError}, "5XX": {"model": MessagesError}}
router = APIRouter(route_class=MessagesRoute, prefix="/v1", tags=["anthropic"])


@router.post("/messages", response_model=NamedAnswer, responses=STREAMED | _FAILED)
async def messages(
    request: Request, body: MessagesRequest, x_user_id: UserHeader = None, x_queue_timeout: QueueTimeout = None
) -> Response:
    """Answer a conversation in the user's own manner, in the format of Anthropic's Messages.

    The user id may also be `metadata.user_id`, and the API key stand in the header x-api-key. In a stream, the
    `message` of the first event has `personalization`. Everything else is as for chat completions.
    """
    return answer_to(request, body, x_queue_timeout, MessagesResponse)


def _event(name: str, **fields: Any) -> bytes:
    return event({"type": name, **fields}, name)


class MessagesResponse(TranslatedResponse):
    """An answer as a message, or in the events of one."""

    ending = _event("message_stop")

    def value(self, answer: Answer) -> dict[str, Any]:
        return {
            "id": answer.public_id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [_block_of(block) for block in self.blocks],
            **self._stopped(),
            "usage": _usage_of(answer),
            "personalization": PersonalizationAnswer.of(answer).model_dump(),
        }

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        yield _event("message_start", message=self.value(answer))
        async for block, text in self.steps(answer):
            if text is None:
                yield _event("content_block_stop", index=block.index)
            elif text:
                kind, field = _DELTAS[block.kind]
                yield _event("content_block_delta", index=block.index, delta={"type": kind, field: text})
            else:
                yield _event("content_block_start", index=block.index, content_block=_block_of(block))
        yield _event("message_delta", delta=self._stopped(), usage=_usage_of(answer))

    def failure(self, error: ApiError) -> bytes:
        return event(MessagesError.of(error), "error")

    def _stopped(self) -> dict[str, str | None]:
        reason = self.finish_reason
        if reason == "stop":  # also of a call that the request demanded
            is_call = any(block.kind is Kind.CALL for block in self.blocks)
            reason = "stop_sequence" if self.stop else "tool_use" if is_call else "end_turn"
        return {"stop_reason": reason and _REASONS.get(reason, reason), "stop_sequence": self.stop}


def _block_of(block: AnswerBlock) -> dict[str, Any]:
    match block.kind:
        case Kind.TEXT:
            return {"type": "text", "text": block.text, "citations": None}
        case Kind.REASONING:
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case Kind.CALL:
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _object_of(block.text)}


def _object_of(arguments: str) -> dict[str, Any]:
    """Return a call's arguments; empty if the model has not written a JSON object, or not yet."""
    with suppress(orjson.JSONDecodeError):
        if isinstance(value := orjson.loads(arguments), dict):
            return value
    return {}


def _usage_of(answer: Answer) -> dict[str, Any]:
    used = answer.stream.usage
    tokens = {"input_tokens": used.get("prompt_tokens", 0), "output_tokens": used.get("completion_tokens", 0)}
    return tokens | {"cache_creation_input_tokens": None, "cache_read_input_tokens": None}
