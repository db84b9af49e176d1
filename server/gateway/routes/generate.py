"""`POST /generate`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from server.engine_protocol import BASE_MODEL
from server.gateway.engines.chat import MOVED, Conversation
from server.gateway.experiments.arms import Arm, Level
from server.gateway.generation.generator import Answer
from server.gateway.generation.request import GenerationRequest, Personalize
from server.gateway.http.bodies import JsonRoute
from server.gateway.http.streaming import DONE, event
from server.gateway.parts import Call, call_of
from server.gateway.routes.answering import AnchorAnswer, AnswerResponse, PersonalizationAnswer, Usage, learnt_of
from server.gateway.routes.requests import GenerateRequest, QueueTimeout, UserRequest
from server.settings import Sampling

_SAMPLING = {"max_tokens", "stop", "seed", *Sampling.model_fields}


class GenerateAnswer(BaseModel, frozen=True):
    id: str
    text: str
    finish_reason: str
    usage: Usage | None = Field(description="Null if the engine does not report it.")
    personalization: PersonalizationAnswer


def _chunk_base(answer_id: str, created_s: int, recipe: str) -> dict[str, Any]:
    return {"id": answer_id, "object": "chat.completion.chunk", "created": created_s, "model": recipe}


def _chunk(base: dict[str, Any], delta: dict[str, str], finish_reason: str | None = None, **more: object) -> bytes:
    """Return one chunk as an event. Uses a plain dictionary for speed: there is one chunk per token."""
    return event({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], **more})


_EXAMPLE = GenerateAnswer(  # no field is null, because FastAPI drops null base from examples
    id="gen-1b0330fa255959863cff0464",
    text="up early, straight to the water",
    finish_reason="stop",
    usage=Usage(prompt_tokens=17, completion_tokens=9, total_tokens=26),
    personalization=PersonalizationAnswer(
        level=Level.MERGED,
        recipe="mta3:9f2c41d0:shared:c+a03*803+a17*197",
        source="signature",
        anchors=[
            AnchorAnswer(id="a03", weight=0.803, similarity=0.9142, gain=0.0613),
            AnchorAnswer(id="a17", weight=0.197, similarity=0.2245, gain=0.0397),
        ],
        history=0,
        history_reason="the user's past items could not be read in time",
        phrases=214,
        moved=5,
        reason="the engine cannot serve this user's adapter",
        arm=Arm.FULL,
        learned=False,
        timings_ms={"profile": 0.3, "recipe": 0.1, "engine": 160.2, "total": 161.4},
    ),
)
_EXAMPLE_BASE = _chunk_base(_EXAMPLE.id, 1790000000, "mta3:9f2c41d0:shared:c+a03*803+a17*197")
_STREAMED = (
    _chunk(_EXAMPLE_BASE, {"role": "assistant", "content": ""}, personalization=_EXAMPLE.personalization)
    + _chunk(_EXAMPLE_BASE, {"content": "up"})
    + _chunk(_EXAMPLE_BASE, {}, "stop", usage=_EXAMPLE.usage, moved=5, timings_ms=_EXAMPLE.personalization.timings_ms)
    + DONE
).decode()
_CONTENT: dict[str, Any] = {
    "application/json": {"example": _EXAMPLE.model_dump(mode="json")},
    "text/event-stream": {"example": _STREAMED},
}

router = APIRouter(route_class=JsonRoute, tags=["generate"])


@router.post("/generate", response_model=GenerateAnswer, responses={200: {"content": _CONTENT}})
async def generate(request: Request, body: GenerateRequest, x_queue_timeout: QueueTimeout = None) -> Response:
    """Answer a prompt in the user's own manner.

    With `stream`, the answer is sent as server-sent events in the format of OpenAI's chunks: the first contains
    `personalization`, the last `usage`, `moved` and `timings_ms`; then follows `data: [DONE]`. Other chunks have
    `moved` if one of the user's phrases had proposed a token of theirs. An error during the stream is an event
    `{"error": …}` without `[DONE]`. While there is nothing to send, a comment (`: keep-alive`) follows every 15
    seconds. An error before the first event or comment is a response with its own status; after it, the status is 200.
    """
    call = call_of(request)
    return GenerateResponse(call, request_of(call, body, body.turns, learn=body.learn, patience_s=x_queue_timeout))


def request_of(
    call: Call, request: UserRequest, messages: Conversation, *, learn: bool | None, patience_s: float | None
) -> GenerationRequest:
    """Convert the body of a call to a generation request."""
    is_personal = request.personalize is not Personalize.NONE
    history = call.parts.bank.manifest.history_default if request.history == "auto" else request.history
    return GenerationRequest(
        id_prefix="gen",
        user=call.user(request.user_id),
        personalize=request.personalize,
        strength=request.strength,
        messages=messages,
        words=request.words,
        history=history,
        max_tokens=request.max_tokens,
        sampling=request.model_dump(include=_SAMPLING, exclude_none=True),
        stream=request.stream,
        users=call.users,
        caller=call.caller,
        holdout=call.holdout,
        learnt=learnt_of(call, messages, learn) if is_personal else None,
        patience_s=patience_s,
        user_param="user_id",
        prompt_param=request.prompt_param,
    )


class GenerateResponse(AnswerResponse):
    def extras(self, text: str) -> dict[str, Any]:
        """Return what the last chunk says of the whole text."""
        return {}

    async def complete(self, answer: Answer) -> GenerateAnswer:
        text = "".join([text async for text, _ in answer.pieces()])
        assert answer.stream.first.finish_reason
        return GenerateAnswer(
            id=answer.public_id,
            text=text,
            finish_reason=answer.stream.first.finish_reason,
            usage=answer.stream.usage or None,
            personalization=PersonalizationAnswer.of(answer),
        )

    async def whole(self, answer: Answer) -> str:
        return (await self.complete(answer)).model_dump_json()

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        base = _chunk_base(answer.public_id, int(time.time()), answer.personalization.public_recipe or BASE_MODEL)
        yield _chunk(base, {"role": "assistant", "content": ""}, personalization=PersonalizationAnswer.of(answer))
        moved, texts = 0, list[str]()
        async for text, value in answer.pieces():
            moved += sum(choice.get(MOVED, 0) for choice in value["choices"])
            if text:  # half a character has none
                texts.append(text)
                yield _chunk(base, {"content": text}, **({MOVED: moved} if moved else {}))
                moved = 0
        reason, stream = answer.stream.first.finish_reason, answer.stream
        known = {"usage": stream.usage or None, MOVED: stream.moved, "timings_ms": answer.timings.ms}
        yield _chunk(base, {}, reason, **known, **self.extras("".join(texts)))
