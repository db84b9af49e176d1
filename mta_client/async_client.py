"""The HTTP API for asyncio, one coroutine per call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import httpx

from mta_client import calls
from mta_client.calls import Call, Events, Items, Patience, Prompt
from mta_client.client import RETRY_S, TIMEOUT_S
from mta_client.results import Answer, Chunk, Erased, Feedback, Job, MtaError, Profile, Rewritten, User, Worth

T = TypeVar("T")
R = TypeVar("R")


class AsyncClient:
    """The methods and options of `mta_client.Client`, to be awaited; other options go to `httpx.AsyncClient`."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = TIMEOUT_S,
        retry_s: float = RETRY_S,
        key: str | None = None,
        **options: Any,
    ) -> None:
        self.url, self.retry_s = url, retry_s
        self._http = httpx.AsyncClient(base_url=url, **calls.http_options(key, timeout_s, options))

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def ready(self) -> bool:
        with suppress(MtaError):
            return await self._once(calls.READY)
        return False

    async def health(self) -> dict[str, Any]:
        return await self._once(calls.HEALTH)

    async def put_profile(self, user_id: str, items: Items) -> Profile:
        return await self._call(calls.put_profile(user_id, items))

    async def add_items(self, user_id: str, items: Items) -> Profile:
        return await self._call(calls.add_items(user_id, items))

    async def user(self, user_id: str) -> User:
        return await self._call(calls.user(user_id))

    async def export(self, user_id: str) -> dict[str, Any]:
        return await self._call(calls.export(user_id))

    async def forget(self, user_id: str, *, missing_ok: bool = False) -> Erased | None:
        try:
            return await self._call(calls.forget(user_id))
        except MtaError as error:
            if missing_ok and (error.status, error.param) == (httpx.codes.NOT_FOUND, "user_id"):
                return None
            raise

    async def generate(self, user_id: str, prompt: Prompt, **options: Any) -> Answer:
        return await self._call(calls.generate(user_id, prompt, options))

    def stream(self, user_id: str, prompt: Prompt, **options: Any) -> AsyncGenerator[Chunk, None]:
        return self._stream(calls.stream(user_id, prompt, options))

    async def rewrite(self, user_id: str, draft: str, **options: Any) -> Rewritten:
        return await self._call(calls.rewrite(user_id, draft, options))

    async def adapt(
        self,
        user_id: str,
        samples: Items,
        *,
        append: bool = False,
        idempotency_key: str | None = None,
        **config: Any,
    ) -> Job:
        call = calls.adapt(user_id, samples, append=append, config=config, idempotency_key=idempotency_key)
        return await self._call(call)

    async def adapters(self, user_id: str) -> list[dict[str, Any]]:
        return await self._call(calls.adapters(user_id))

    async def serve(self, user_id: str, version: int) -> dict[str, Any]:
        return await self._call(calls.serve(user_id, version))

    async def feedback(self, user_id: str, answer: str, **given: Any) -> Feedback:
        return await self._call(calls.feedback(user_id, answer, given))

    async def worth(self) -> Worth:
        return await self._call(calls.WORTH)

    async def job(self, job_id: str) -> Job:
        return await self._call(calls.job(job_id))

    async def cancel(self, job_id: str) -> Job:
        return await self._call(calls.cancel(job_id))

    def events(self, job_id: str) -> AsyncGenerator[Job, None]:
        return self._stream(calls.events(job_id))

    async def wait(self, job_id: str, *, timeout_s: float = 600.0, poll_s: float = 0.1) -> Job:
        deadline_s = time.monotonic() + timeout_s
        while (job := await self.job(job_id)).ended_at is None:
            if time.monotonic() > deadline_s:
                raise calls.timed_out(job, timeout_s)
            await asyncio.sleep(poll_s)
        return job

    async def _call(self, call: Call[T]) -> T:
        return await self._patiently(lambda: self._once(call))

    async def _once(self, call: Call[T]) -> T:
        response = await self._send(call)
        with call.explained(self.url):
            return call.read(response.json())

    async def _stream(self, call: Call[T]) -> AsyncGenerator[T, None]:
        response, events = await self._patiently(lambda: self._send(call, stream=True)), Events()
        async with aclosing(response):
            with call.explained(self.url, streaming=True):
                async for piece in response.aiter_bytes():
                    for event in events.feed(piece):
                        yield call.read(event)
                    if events.done:
                        return
        raise calls.broken_off()

    async def _send(self, call: Call[T], *, stream: bool = False) -> httpx.Response:
        """Return a 2xx response; the body of a stream is not read yet, and the caller closes it."""
        request = call.request(self._http)
        with call.explained(self.url):
            response = await self._http.send(request, stream=stream)
            if response.is_success:
                return response
            async with aclosing(response):
                await response.aread()
            raise calls.error_of(response)

    async def _patiently(self, attempt: Callable[[], Awaitable[R]]) -> R:
        patience = Patience(self.retry_s)
        while True:
            try:
                return await attempt()
            except MtaError as error:
                await asyncio.sleep(patience.pause_s(error))
