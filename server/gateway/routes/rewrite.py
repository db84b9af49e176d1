"""`POST /rewrite`: a draft from anywhere, in the person's own words, and which of its facts are still there."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request, Response
from pydantic import AfterValidator, BaseModel, Field, model_validator
from pydantic_core import PydanticCustomError

from bank.items.drafts import kept
from bank.items.prompt import chat_messages
from bank.items.tasks import Task
from server.errors import ApiError, NotFound
from server.gateway.engines.chat import Conversation
from server.gateway.generation.generator import Answer
from server.gateway.generation.request import GenerationRequest
from server.gateway.http.bodies import JsonRoute
from server.gateway.parts import Call, call_of
from server.gateway.routes.generate import GenerateAnswer, GenerateResponse, request_of
from server.gateway.routes.requests import QueueTimeout, UserRequest, check_not_blank, with_examples

Written = Annotated[str, Field(min_length=1), AfterValidator(check_not_blank)]


class FactsLost(ApiError):
    status, kind, default_code = 422, "invalid_request_error", "facts_lost"


class RewriteRequest(UserRequest):
    """A draft to be rewritten for one user."""

    model_config = with_examples(
        {"user_id": "ada", "draft": "The meeting is moved to Tuesday at 10:30.", "notes": ["bring the plan"]}
    )

    draft: Written
    notes: list[Written] | None = Field(None, min_length=1, max_length=64, description="What the text should say, too.")
    learn: None = Field(None, description="A draft is never learnt: it is not the user's own text.")
    on_loss: Literal["retry", "refuse", "serve"] = Field(
        "serve",
        description="What follows if a number, address, link or name of the draft is missing: `retry` once and serve "
        "the better answer, `refuse` (422 `facts_lost`), or `serve`. The first two cannot be streamed.",
    )

    @model_validator(mode="after")
    def _check_on_loss(self) -> Self:
        if self.stream and self.on_loss != "serve":
            message = f"on_loss is {self.on_loss}, but a stream is sent as it is made"
            raise PydanticCustomError("combination", message, {"param": "on_loss"})
        return self

    @property
    def prompt_param(self) -> str:
        return "draft"

    @property
    def whole(self) -> str:
        """The draft, and the notes below it."""
        return "\n".join((self.draft, ", ".join(self.notes))) if self.notes else self.draft


class Kept(BaseModel, frozen=True):
    kept: dict[str, str] = Field(description="For `numbers`, `addresses`, `links`, `names`: how many, as `3 of 4`.")
    missing: list[str] = Field(description="Facts of the draft that the text lacks.")
    added: list[str] = Field(description="Facts of the text that the draft lacks.")


class RewriteAnswer(GenerateAnswer, Kept, frozen=True):
    pass


router = APIRouter(route_class=JsonRoute, tags=["generate"])


@router.post("/rewrite", response_model=RewriteAnswer, responses={200: {"content": {"text/event-stream": {}}}})
async def rewrite(request: Request, body: RewriteRequest, x_queue_timeout: QueueTimeout = None) -> Response:
    """Rewrite a draft in the user's own manner.

    Needs a bank for drafts. Everything is as for `/generate`; the answer, in a stream its last chunk, also says which
    facts of the draft are `kept`, `missing` and `added`.
    """
    call = call_of(request)
    turns = draft_turns(body.whole, call.parts.bank.task)
    return _RewriteResponse(call, request_of(call, body, turns, learn=False, patience_s=x_queue_timeout), body)


def draft_turns(draft: str, task: Task) -> Conversation:
    """Return the prompt for a draft.

    Raises:
        NotFound: if the bank's task is not one for drafts.
    """
    if not task.drafted:
        raise NotFound(
            f"this server's bank is one of {task.name}: build one for drafts with `mta bank build --task rewrite`, and "
            "serve it",
            code="no_rewrite_bank",
        )
    return chat_messages(task.turn(draft))


def facts_of(draft: str, text: str) -> dict[str, Any]:
    """Return the fields of `Kept`."""
    counts, missing, added = kept(draft, text)
    return {"kept": counts, "missing": missing, "added": added}


class _RewriteResponse(GenerateResponse):
    def __init__(self, call: Call, generation: GenerationRequest, body: RewriteRequest) -> None:
        super().__init__(call, generation)
        self._draft, self._on_loss = body.whole, body.on_loss
        self._best: RewriteAnswer | None = None
        self._attempts = 0

    async def whole(self, answer: Answer) -> str:
        plain = await self.complete(answer)
        made = RewriteAnswer(**dict(plain), **self.extras(plain.text))
        if made.missing and self._on_loss == "refuse":
            raise FactsLost(
                f"the text lacks {', '.join(made.missing)} of the draft: try again, or set on_loss to serve"
            )
        self._attempts += 1
        if self._best is None or len(made.missing) < len(self._best.missing):
            self._best = made
        return self._best.model_dump_json()

    def again(self) -> GenerationRequest | None:
        """Ask once more, and name what was lost."""
        if self._on_loss != "retry" or self._attempts > 1 or not (self._best and self._best.missing):
            return None
        turn = f"{self._request.messages[-1]['content']}\nIt must name: {', '.join(self._best.missing)}"
        return replace(self._request, messages=chat_messages(turn))

    def extras(self, text: str) -> dict[str, Any]:
        return facts_of(self._draft, text)
