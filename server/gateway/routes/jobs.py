"""`/users/{user_id}/adapt` and `/jobs/{job_id}`: few-shot training."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import StreamingResponse

from adapters.errors import excerpt
from server.errors import ApiError, NotFound
from server.gateway.http import streaming
from server.gateway.http.json_body import SamplesRoute
from server.gateway.http.requests import AdaptRequest, UserIdInPath
from server.gateway.parts import Parts, parts_of
from server.gateway.routes.answers import ErrorAnswer, JobAnswer, job_answer
from server.store.jobs import JobId, parse_job_id

router = APIRouter(
    route_class=SamplesRoute, tags=["adapt"], responses={"4XX": {"model": ErrorAnswer}, "5XX": {"model": ErrorAnswer}}
)
JobIdInPath = Annotated[str, Path(description="As `POST /users/{user_id}/adapt` gave it.", max_length=64)]

_POLL_S = 0.5
_STREAM = {"example": 'data: {"id": "…", "state": "running", "progress": {"step": 4, "of": 64, "loss": 1.93}}\n\n'}


@router.post("/users/{user_id}/adapt", status_code=202)
async def adapt(request: Request, response: Response, user_id: UserIdInPath, body: AdaptRequest) -> JobAnswer:
    """Train a small adapter of the user's own on samples of how they want to be answered.

    The samples take the place of the last ones, and the job that of the user's earlier jobs. A user without a profile
    gets one of the samples. The adapter is served once it has lowered the loss on samples it was not trained on.
    Samples also come as newline-delimited JSON (`application/x-ndjson`), one a line.
    """
    job = await parts_of(request).adapting.submit(user_id, body)
    response.headers["Location"] = f"/jobs/{job.id}"
    return job_answer(job)


@router.get("/jobs/{job_id}")
async def read_job(request: Request, job_id: JobIdInPath) -> JobAnswer:
    """Where a job is."""
    return job_answer(await parts_of(request).adapting.job(_parsed(job_id)))


@router.delete("/jobs/{job_id}")
async def cancel_job(request: Request, job_id: JobIdInPath) -> JobAnswer:
    """Cancel a job that has not ended; training stops within a step, and nothing of it is kept."""
    return job_answer(await parts_of(request).adapting.cancel(_parsed(job_id)))


@router.get("/jobs/{job_id}/events", responses={200: {"content": {"text/event-stream": _STREAM}}})
async def follow_job(request: Request, job_id: JobIdInPath) -> StreamingResponse:
    """The job as server-sent events: whenever it has changed, until it has ended, then `data: [DONE]`.

    While nothing changes, a comment (`: keep-alive`) comes every 15 seconds.
    """
    parts, parsed = parts_of(request), _parsed(job_id)
    first = job_answer(await parts.adapting.job(parsed))
    return StreamingResponse(_events(parts, parsed, first), media_type=streaming.MEDIA_TYPE, headers=streaming.HEADERS)


async def _events(parts: Parts, job_id: JobId, answer: JobAnswer) -> AsyncIterator[bytes]:
    told, told_s = None, 0.0
    while True:
        if answer != told:
            yield streaming.event(answer.model_dump(mode="json"))
            told, told_s = answer, time.monotonic()
        elif time.monotonic() - told_s >= streaming.KEEP_ALIVE_S:
            yield streaming.KEEP_ALIVE
            told_s = time.monotonic()
        if answer.state.ended:
            yield streaming.DONE
            return
        await asyncio.sleep(_POLL_S)
        try:
            answer = job_answer(await parts.adapting.job(job_id))
        except ApiError as error:
            yield streaming.event(error.body())
            return


def _parsed(text: str) -> JobId:
    job_id = parse_job_id(text)
    if job_id is None:
        raise NotFound(
            f"job_id {excerpt(text)} is not a job id: it is what POST /users/{{id}}/adapt answers", param="job_id"
        )
    return job_id
