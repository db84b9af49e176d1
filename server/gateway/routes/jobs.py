"""`/users/{user_id}/adapt` and `/jobs/{job_id}`: few-shot training."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Self

import orjson
from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from adapters.errors import excerpt
from bank.items.profile import SHORTEST, text_pair, untaught
from bank.items.prompt import chat_messages
from bank.items.tasks import Task
from server.errors import ApiError, InvalidRequest, NotFound, TooMany, Unavailable
from server.gateway.http.errors import ErrorAnswer
from server.gateway.http.streaming import DONE, ClientGone, EventSender, event, unless_gone
from server.gateway.parts import call_of, gateway_of
from server.gateway.routes.requests import (
    SampleInput,
    SampleOutput,
    Strict,
    UserIdInPath,
    UserSamplesRoute,
    epoch_of,
    sample_messages,
    with_examples,
)
from server.gateway.users.adapting import Adapting, TrainingRequest
from server.store.jobs import Job, JobId, JobState, parse_job_id
from server.store.samples import MAX_SAMPLES, Sample

MAX_USER_RANK = 8
MAX_STEPS = 500
_POLL_S = 0.5


class SampleRequest(Strict):
    """One example of how the user wants to be answered, or where people write freely, a text of the user's alone."""

    input: SampleInput | None = Field(None, description="One user turn, or a conversation that ends with one.")
    output: SampleOutput | None = Field(None, description="The desired answer.")
    text: SampleOutput | None = Field(None, description="Instead of both, a text that the user wrote.")


class AdaptOptions(Strict):
    """Training options; the server chooses those that are not set."""

    rank: int | None = Field(
        None, ge=1, le=MAX_USER_RANK, description="Rank of the user's LoRA, up to the bank's limit for users."
    )
    steps: int | None = Field(None, ge=1, le=MAX_STEPS, description="Maximum number of optimiser steps in one run.")
    learning_rate: float | None = Field(None, gt=0, le=1)
    holdout: float | None = Field(
        None, ge=0.05, le=0.5, description="Share of the samples to hold out in turn, if there are more than 20."
    )
    strength: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Factor on the anchor weights of the merged adapter to train on: 1, the default, trains on that "
        "adapter, 0 on the common row alone.",
    )


class AdaptRequest(Strict):
    """Samples to train on."""

    model_config = with_examples(
        {
            "samples": [
                {"input": "Any plans?", "output": "The sea. Always the sea."},
                {"input": "How was your day?", "output": "Salty. Glorious."},
            ]
        }
    )

    samples: list[SampleRequest] = Field(fail_fast=True, min_length=1, max_length=MAX_SAMPLES)
    config: AdaptOptions = AdaptOptions()
    append: bool = Field(False, description="Add to the kept samples instead of replacing them.")
    idempotency_key: str | None = Field(
        None, min_length=1, max_length=128, description="Repeating the key returns the same job."
    )


class JobProgress(BaseModel, frozen=True):
    """A job's progress, over all its training runs. Losses are in nats per output token."""

    step: int
    steps: int = Field(description="Current estimate: a run stops early when the loss no longer falls.")
    phase: str = Field(description="Current activity in a few words.", examples=["fold 1 of 2"])
    loss: list[tuple[int, float]] = Field(
        description="Step and training loss; at most 200 points, always including the last step."
    )
    held_out: list[tuple[int, float]] = Field(
        description="Step and loss on held-out samples, where measured. Each run starts again."
    )
    runs: list[tuple[int, str]] = Field(description="The steps done before each training run, and its phase.")


class HeldOut(BaseModel, frozen=True):
    """Loss on held-out samples in nats per output token; null until it is known."""

    before: float | None = Field(
        description="Loss with the best that the user is served without the new adapter: the merged adapter, the "
        "adapter in use, the common row or the base model."
    )
    after: float | None = Field(description="Loss with the new adapter.")
    served: float | None = Field(description="Loss with the adapter in use, if there is one.")


class ShownAnswer(BaseModel, frozen=True):
    """One sample that was held out, and the beginnings of the likeliest answers to it, without the user's phrases."""

    input: str = Field(description="The beginning of the user's turn.")
    wanted: str = Field(description="The beginning of the sample's answer.")
    before: str = Field(description="Answer with the recipe beneath the adapter.")
    after: str = Field(description="Answer with an adapter on it that was trained without this sample.")


class JobAnswer(BaseModel, frozen=True):
    id: str
    state: JobState = Field(description="All but the first two are final. `rejected`: not surely better.")
    config: dict[str, Any]
    progress: JobProgress
    held_out: HeldOut
    created_at: str
    started_at: str | None
    ended_at: str | None
    tries: int = Field(description="Number of times a worker has started the job.")
    adapter: str | None = Field(description="Id of the user adapter that the job made.")
    error: str | None = Field(description="Why the job failed or its adapter was rejected, and what to do.")
    shown: ShownAnswer | None = Field(description="What training changes; null until it is known.")
    hint: str | None = Field(
        description="In the answer to new samples: how many do not look like the bank's task, if any."
    )

    @classmethod
    def of(cls, job: Job, hint: str | None = None) -> Self:
        shown = job.curve.shown
        return cls(
            id=str(job.id),
            state=job.state,
            config=orjson.loads(job.config),
            progress=JobProgress(
                step=job.step,
                steps=job.of,
                phase=job.curve.phase or ("preparing" if job.state is JobState.RUNNING else job.state.value),
                loss=list(job.curve.loss),
                held_out=list(job.curve.held_out),
                runs=list(job.curve.runs),
            ),
            held_out=HeldOut(before=job.before, after=job.after, served=job.served),
            created_at=iso(job.created_ms),
            started_at=iso(job.started_ms) if job.started_ms else None,
            ended_at=iso(job.ended_ms) if job.ended_ms else None,
            tries=job.tries,
            adapter=job.adapter or None,
            error=job.error or None,
            shown=ShownAnswer(**dict(zip(ShownAnswer.model_fields, shown, strict=False))) if shown else None,
            hint=hint,
        )


def iso(unix_ms: int) -> str:
    return datetime.fromtimestamp(unix_ms / 1000, UTC).isoformat(timespec="milliseconds")


router = APIRouter(route_class=UserSamplesRoute, tags=["adapt"])
JobIdInPath = Annotated[str, Path(description="Id returned by `POST /users/{user_id}/adapt`.", max_length=64)]

EXAMPLE = JobAnswer(
    id="q5kxv7d2m4zr3yh6wncb2tpaei.1871290335",
    state=JobState.RUNNING,
    config={"rank": 2, "steps": 6, "learning_rate": 0.0014, "holdout": 0.2, "strength": 1.0},
    progress=JobProgress(
        step=4,
        steps=18,
        phase="fold 1 of 2",
        loss=[(1, 2.41), (2, 2.2), (3, 2.06), (4, 1.93)],
        held_out=[(0, 2.38), (2, 2.21), (4, 2.04)],
        runs=[(0, "fold 1 of 2")],
    ),
    held_out=HeldOut(before=None, after=None, served=None),
    created_at="2026-11-27T08:03:41.208+00:00",
    started_at="2026-11-27T08:03:41.733+00:00",
    ended_at=None,
    tries=1,
    adapter=None,
    error=None,
    shown=None,
    hint=None,
)
_EVENTS = {"text/event-stream": {"example": event(EXAMPLE, "job").decode()}}


@router.post("/users/{user_id}/adapt", status_code=202)
async def adapt(request: Request, response: Response, user_id: UserIdInPath, body: AdaptRequest) -> JobAnswer:
    """Train a small adapter for the user on samples of how they want to be answered.

    The samples replace the previous ones, and the job supersedes the user's earlier jobs. If the user has no profile,
    one is created from the samples. The adapter is served only if, on held-out samples, it is surely better than what
    the user is served without it; that takes a few samples. Samples can also be sent as newline-delimited JSON
    (`application/x-ndjson`), one per line.
    """
    call, epoch = call_of(request), epoch_of(request)
    parts, user = call.parts, call.user(user_id)
    training = await asyncio.to_thread(_training_request, body, parts.bank.task)
    training = replace(training, keep=call.caller.policy.keep_texts)
    submit = partial(parts.adapting.submit, user, training, epoch)
    try:
        job = await call.gateway.limiter.take_job(call.caller, user.key, submit)
    except TooMany:  # the limit is for new jobs: a client that lost the response still gets its job
        if (duplicate := await parts.adapting.find_duplicate(user, training, epoch)) is None:
            raise
        job = duplicate
    response.headers["Location"] = f"/jobs/{job.id}"
    return JobAnswer.of(job, _hint(training, parts.bank.task))


@router.get("/jobs/{job_id}")
async def read_job(request: Request, job_id: JobIdInPath) -> JobAnswer:
    """Return the job's current state."""
    return JobAnswer.of(await _stored(request).job(call_of(request).users, _checked_job_id(job_id)))


@router.delete("/jobs/{job_id}")
async def cancel_job(request: Request, job_id: JobIdInPath) -> JobAnswer:
    """Cancel a job that has not ended; training stops within one step and its result is discarded."""
    return JobAnswer.of(await _stored(request).cancel(call_of(request).users, _checked_job_id(job_id)))


@router.get("/jobs/{job_id}/events", response_class=Response, responses={200: {"content": _EVENTS}})
async def follow_job(request: Request, job_id: JobIdInPath) -> Response:
    """Stream the job as server-sent events: `job` now and after each change, then `done` when the job has ended.

    While nothing changes, a comment (`: keep-alive`) is sent every 15 seconds. If the gateway stops before that,
    the stream ends with an event `{"error": …}` of the code `stopping`: follow the job again.
    """
    read = partial(_stored(request).job, call_of(request).users)
    return _JobEvents(read, await read(_checked_job_id(job_id)))


def _stored(request: Request) -> Adapting:
    """Return what knows the jobs in the store: for these a tenant's bank need not be loaded."""
    return gateway_of(request).default_parts.adapting


class _JobEvents(Response):
    def __init__(self, read: Callable[[JobId], Awaitable[Job]], job: Job) -> None:
        super().__init__()
        self._read = read
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientGone):
            await unless_gone(receive, self._follow(scope, send))

    async def _follow(self, scope: Scope, send: Send) -> None:
        job = self._job
        async with EventSender(send, dict) as sender:
            await sender.write(event(JobAnswer.of(job), "job"))
            try:
                while not job.state.ended:
                    if scope["state"].get("stopping"):
                        raise Unavailable("this gateway is stopping: follow the job again", code="stopping")
                    await asyncio.sleep(_POLL_S)
                    before, job = job, await self._read(job.id)
                    if job != before:
                        await sender.write(event(JobAnswer.of(job), "job"))
                await sender.write(b"event: done\n" + DONE)
            except ApiError as error:
                await sender.write(event(ErrorAnswer.of(error)))


def _training_request(body: AdaptRequest, task: Task) -> TrainingRequest:
    samples = [_sample(f"samples.{position}", sample, task) for position, sample in enumerate(body.samples)]
    return TrainingRequest(samples, body.config.model_dump(exclude_none=True), body.append, body.idempotency_key or "")


def _hint(training: TrainingRequest, task: Task) -> str | None:
    """Return how many samples do not look like the bank's task, and what that means; None if all do."""
    samples = training.samples
    other = sum(not sample.pair[0].startswith(task.instruction) for sample in samples)
    if not other:
        return None
    return (
        f"{other} of {len(samples)} samples are not of the bank's task, {task.name}, whose turns begin with "
        f"{excerpt(task.instruction)}: its anchors know nothing of other turns, so that answers to these may be poor"
    )


def _sample(where: str, given: SampleRequest, task: Task) -> Sample:
    if given.input is not None and given.output is not None and given.text is None:
        return Sample(sample_messages(given.input, task), given.output)
    texts = [text for text in (given.output, given.text) if text is not None]
    if given.input is not None or len(texts) != 1:
        raise InvalidRequest(f"{where} must have input and output, or text alone: got {excerpt(given)}", param=where)
    if (pair := text_pair(texts[0], task)) is None:
        raise InvalidRequest(f"{where} has no input, and {untaught(texts[0], task, SHORTEST)}", param=where)
    return Sample(chat_messages(pair[0]), pair[1])


def _checked_job_id(text: str) -> JobId:
    if (job_id := parse_job_id(text)) is None:
        message = f"job_id {excerpt(text)} is not a job id: use the id that POST /users/{{id}}/adapt returned"
        raise NotFound(message, param="job_id")
    return job_id
