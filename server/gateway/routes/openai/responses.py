"""`POST /v1/responses`: OpenAI's Responses, of which nothing is stored."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Path, Request, Response
from pydantic import BeforeValidator, Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from adapters.errors import excerpt
from server.errors import ApiError, InvalidRequest, NotFound
from server.gateway.generation.generator import Answer
from server.gateway.generation.request import GenerationRequest
from server.gateway.http import streaming
from server.gateway.http.bodies import JsonRoute
from server.gateway.parts import Call
from server.gateway.routes.answering import PersonalizationAnswer
from server.gateway.routes.openai.requests import (
    IGNORED,
    STRING,
    TranslatedRequest,
    object_schema,
    text_of,
    texts_schema,
)
from server.gateway.routes.openai.routes import STREAMED, NamedAnswer, UserHeader, answer_to
from server.gateway.routes.openai.structure import ToolChoice
from server.gateway.routes.openai.translation import (
    AnswerBlock,
    Kind,
    TranslatedResponse,
    Turn,
    conversation_of,
    tool_call,
)
from server.gateway.routes.requests import MAX_MESSAGES, QueueTimeout, Strict
from server.observability.logs import request_id
from server.settings import MAX_INT32

_STORED = ("store", "previous_response_id", "conversation", "prompt", "background")
_NOTHING_STORED = "nothing is stored here: send the whole conversation as `input`, and `store` false or not at all"
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_TEXTS = ("input_text", "output_text")


def _turn_of(item: Any) -> Turn:
    """Convert an input item; ids, statuses, annotations and whatever else clients send back is ignored."""
    match item:
        case {"type": "function_call", "call_id": str(call_id), "name": str(name), "arguments": str(text)} if name:
            return tool_call(call_id, name, text)
        case {"type": "function_call_output", "call_id": str(call_id), "output": output}:
            return {"role": "tool", "tool_call_id": call_id, "content": text_of(output, *_TEXTS)}
        case {"type": "reasoning"}:
            said = text_of(item.get("content") or "", "reasoning_text")
            return {"role": "assistant", "content": "", "reasoning": said}
        case {"role": str(role), "content": content} if role in _ROLES and item.get("type", "message") == "message":
            return {"role": _ROLES[role], "content": text_of(content, *_TEXTS)}
        case {"type": "item_reference"}:
            raise PydanticCustomError("item", "must be the item itself: nothing is stored that it could refer to")
    raise PydanticCustomError("item", "must be a message, function_call, function_call_output or reasoning")


def _function_of(tool: Any) -> dict[str, Any]:
    match tool:
        case {"type": "function", "name": str()}:
            return {name: tool.get(name) for name in ("name", "description", "parameters", "strict")}
    raise PydanticCustomError("tool", "must be a function with a name: no other tools are run here")


_FUNCTION = {"type": {"const": "function"}, "name": STRING}
_ITEM = {
    "anyOf": [
        object_schema({"role": {"enum": list(_ROLES)}, "content": texts_schema(*_TEXTS)}, type={"const": "message"}),
        object_schema({"type": {"const": "function_call"}, "call_id": STRING, "name": STRING, "arguments": STRING}),
        object_schema({"type": {"const": "function_call_output"}, "call_id": STRING, "output": texts_schema(*_TEXTS)}),
        object_schema({"type": {"const": "reasoning"}}, content=texts_schema("reasoning_text")),
    ]
}

Item = Annotated[Any, PlainValidator(_turn_of), WithJsonSchema(_ITEM)]
Input = Annotated[
    list[Item],
    Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True),
    BeforeValidator(
        lambda given: [{"role": "user", "content": given}] if isinstance(given, str) else given,
        json_schema_input_type=str | list[Item],
    ),
]


class TextOptions(Strict):
    format: dict[str, Any] | None = Field(None, description="Of type `text`, `json_object` or `json_schema`.")
    verbosity: str | None = Field(None, description="No effect.")


class ResponsesRequest(TranslatedRequest):
    ID_PREFIX = "resp"
    PROMPT = "input"
    LONGEST = "max_output_tokens"
    HINTS = IGNORED.union(
        _STORED, ("include", "max_tool_calls", "prompt_cache_options", "reasoning", "stream_options", "truncation")
    )
    RENAMED: ClassVar = {"messages": "input", ".function": "", "response_format": "text.format"}

    input: Input
    instructions: str | None = Field(None, description="The system prompt, before all of `input`.")
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_INT32, description="Refused beyond the context.")
    text: TextOptions | None = None
    tools: list[Annotated[Any, PlainValidator(_function_of), WithJsonSchema(object_schema(_FUNCTION))]] | None = None
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True

    @classmethod
    def check(cls, fields: Mapping[str, Any]) -> None:
        super().check(fields)
        if name := next((name for name in _STORED if fields.get(name)), None):
            raise InvalidRequest(f"{name} is {excerpt(fields[name])}, but {_NOTHING_STORED}", param=name, code="stored")
        if isinstance(include := fields.get("include"), list) and "message.output_text.logprobs" in include:
            message = "include must not have message.output_text.logprobs, which only /v1/chat/completions has"
            raise InvalidRequest(message, param="include")

    def chat_fields(self) -> dict[str, Any]:
        system = [{"role": "system", "content": self.instructions}] if self.instructions else []
        form, choice = self.text and self.text.format, self.tool_choice
        if form and form.get("type") == "json_schema":
            form = {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
        if isinstance(choice, dict):
            choice = {"type": choice.get("type"), "function": {"name": choice.get("name")}}
        return {
            "messages": conversation_of([*system, *self.input]),
            "max_tokens": self.max_output_tokens,
            "response_format": form,
            "tools": [{"type": "function", "function": function} for function in self.tools or ()] or None,
            "tool_choice": None if choice == "auto" else choice,
            "parallel_tool_calls": None if self.parallel_tool_calls else False,
        }


router = APIRouter(route_class=JsonRoute, prefix="/v1", tags=["openai"])


@router.post("/responses", response_model=NamedAnswer, responses=STREAMED)
async def responses(
    request: Request, body: ResponsesRequest, x_user_id: UserHeader = None, x_queue_timeout: QueueTimeout = None
) -> Response:
    """Answer a conversation in the user's own manner, in the format of OpenAI's Responses.

    Nothing is stored: each request has the whole conversation as `input`. In a stream, the `response` of events has
    `personalization`. Everything else is as for chat completions.
    """
    return answer_to(request, body, x_queue_timeout, ResponsesResponse)


@router.get("/responses/{response_id}")
async def response(response_id: Annotated[str, Path(description="Id of a response.", examples=["resp-1"])]) -> None:
    """Answer 404, because no response is stored."""
    raise NotFound(f"response {excerpt(response_id)}: {_NOTHING_STORED}", param="response_id", code="stored")


_TOLD = {Kind.TEXT: "output_text", Kind.REASONING: "reasoning_text", Kind.CALL: "function_call_arguments"}
_LOGPROBS: Mapping[Kind, dict[str, Any]] = {Kind.TEXT: {"logprobs": []}}  # which texts must have, and do not
_FIXED = {  # fields that OpenAI's schema demands
    **{"store": False, "background": False, "truncation": "disabled", "service_tier": "default", "metadata": {}},
    **{"top_logprobs": 0, "presence_penalty": 0.0, "frequency_penalty": 0.0},
    "reasoning": {"effort": None, "summary": None},
    **dict.fromkeys(("previous_response_id", "max_tool_calls", "safety_identifier", "prompt_cache_key")),
}


class ResponsesResponse(TranslatedResponse):
    """An answer as a response, or in the events of one, which are numbered."""

    def __init__(self, call: Call, generation: GenerationRequest, body: ResponsesRequest) -> None:
        super().__init__(call, generation, body)
        self._body = body
        self._created_s = int(time.time())
        self._number = -1  # of the last event

    def value(self, answer: Answer | None, status: str = "", error: dict[str, str] | None = None) -> dict[str, Any]:
        """Return the response; `answer` is None after an error before its beginning."""
        status = status or ("incomplete" if self.finish_reason == "length" else "completed")
        body, sampling = self._body, answer.sampling if answer else {}
        value = {
            "id": answer.public_id if answer else f"{body.ID_PREFIX}-{request_id.get()}",
            "object": "response",
            "created_at": self._created_s,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "model": body.model,
            "user": body.user,
            "instructions": body.instructions,
            "output": [self._item(block) for block in self.blocks],
            "usage": _usage_of(answer) if answer and status != "in_progress" else None,
            "max_output_tokens": body.max_output_tokens,
            "text": {"format": (body.text and body.text.format) or {"type": "text"}},
            "tools": [{"type": "function", **function} for function in body.tools or ()],
            "tool_choice": body.tool_choice,
            "parallel_tool_calls": body.parallel_tool_calls,
            "temperature": sampling.get("temperature", 1.0),
            "top_p": sampling.get("top_p", 1.0),
            **_FIXED,
        }
        return value | ({"personalization": PersonalizationAnswer.of(answer).model_dump()} if answer else {})

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        for name in ("created", "in_progress"):
            yield self._event(name, response=self.value(answer, "in_progress"))
        async for block, text in self.steps(answer):
            told, is_call, state = _TOLD[block.kind], block.kind is Kind.CALL, "done" if block.ended else "added"
            where = {"item_id": _item_id(block)} | ({} if is_call else {"content_index": 0})
            event = partial(self._event, output_index=block.index)
            if text:
                yield event(f"{told}.delta", **where, delta=text, **_LOGPROBS.get(block.kind, {}))
                continue
            if block.ended:
                whole = {"arguments" if is_call else "text": block.text}
                yield event(f"{told}.done", **where, **whole, **_LOGPROBS.get(block.kind, {}))
            else:
                yield event("output_item.added", item=self._item(block))
            if not is_call:
                yield event(f"content_part.{state}", **where, part=_part_of(block))
            if block.ended:
                yield event("output_item.done", item=self._item(block))
        value = self.value(answer)
        yield self._event(value["status"], response=value)

    def failure(self, error: ApiError) -> bytes:
        failed = self.value(self._answer, "failed", {"code": "server_error", "message": error.message})
        return self._event("failed", response=failed)

    def _event(self, name: str, **fields: Any) -> bytes:
        self._number += 1
        name = f"response.{name}"
        return streaming.event({"type": name, "sequence_number": self._number, **fields}, name)

    def _item(self, block: AnswerBlock) -> dict[str, Any]:
        is_cut = self.finish_reason == "length" and block is self.blocks[-1]
        status = "in_progress" if not block.ended else "incomplete" if is_cut else "completed"
        item = {"id": _item_id(block), "status": status}
        if block.kind is Kind.CALL:
            called = {"call_id": block.call_id, "name": block.name, "arguments": block.text}
            return {"type": "function_call", **item, **called}
        content = [_part_of(block)] if block.pieces or block.ended else []
        if block.kind is Kind.REASONING:
            return {"type": "reasoning", "summary": [], **item, "content": content}
        return {"type": "message", "role": "assistant", **item, "content": content}


def _item_id(block: AnswerBlock) -> str:
    return f"item_{block.index}_{request_id.get()}"


def _part_of(block: AnswerBlock) -> dict[str, Any]:
    part = {"type": _TOLD[block.kind], "text": block.text}
    return part | {"annotations": [], **_LOGPROBS[block.kind]} if block.kind is Kind.TEXT else part


def _usage_of(answer: Answer) -> dict[str, Any] | None:
    """Return the tokens under OpenAI's names; engines do not say how many were cached, or reasoning."""
    if not (used := answer.stream.usage):
        return None
    return {
        "input_tokens": used["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": used["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": used["total_tokens"],
    }
