"""The HTTP API, one method per call."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from typing import Any, TypeVar

import httpx

from mta_client import calls
from mta_client.calls import Call, Events, Items, Patience, Prompt
from mta_client.results import Answer, Chunk, Erased, Feedback, Job, MtaError, Profile, Rewritten, User, Worth

T = TypeVar("T")
R = TypeVar("R")

TIMEOUT_S = 120.0
RETRY_S = 30.0


class Client:
    """A thread-safe client for one server. Methods raise only `MtaError`.

    A call that the server was too busy to answer, or that got no answer, is sent again: after the time that the server
    asks for (`Retry-After`), for at most `retry_s`. Every call can be repeated without doing anything twice; a stream
    is repeated only before its first chunk. `timeout_s` is the longest wait for data within an answer; a healthy stream
    sends some at least every 15 s. `key` defaults to MTA_API_KEY from the environment. Other options go to
    `httpx.Client`, for example `verify`.
    """

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
        self._http = httpx.Client(base_url=url, **calls.http_options(key, timeout_s, options))
        self._stopped = threading.Event()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def stop(self) -> None:
        """Repeat no call from now on; those that wait for it, in any thread, fail at once."""
        self._stopped.set()

    def ready(self) -> bool:
        """Return whether the server can fully serve requests now (`GET /ready`)."""
        with suppress(MtaError):
            return self._once(calls.READY)
        return False

    def health(self) -> dict[str, Any]:
        """Return the last known state of the server's parts (`GET /health`)."""
        return self._once(calls.HEALTH)

    def put_profile(self, user_id: str, items: Items) -> Profile:
        """Replace a user's history with these items."""
        return self._call(calls.put_profile(user_id, items))

    def add_items(self, user_id: str, items: Items) -> Profile:
        """Add items to a user's history, replacing items with the same `id`."""
        return self._call(calls.add_items(user_id, items))

    def user(self, user_id: str) -> User:
        """Return a summary of a user's stored data, and the anchors that serve them."""
        return self._call(calls.user(user_id))

    def export(self, user_id: str) -> dict[str, Any]:
        """Return all stored data of a user (`GET /users/{id}/export`)."""
        return self._call(calls.export(user_id))

    def forget(self, user_id: str, *, missing_ok: bool = False) -> Erased | None:
        """Erase a user; with `missing_ok`, return None if nothing is stored about them."""
        try:
            return self._call(calls.forget(user_id))
        except MtaError as error:
            if missing_ok and (error.status, error.param) == (httpx.codes.NOT_FOUND, "user_id"):
                return None
            raise

    def generate(self, user_id: str, prompt: Prompt, **options: Any) -> Answer:
        """Generate an answer; `options` are the other fields of `POST /generate`, for example `max_tokens`."""
        return self._call(calls.generate(user_id, prompt, options))

    def stream(self, user_id: str, prompt: Prompt, **options: Any) -> Generator[Chunk, None, None]:
        """Stream an answer; closing the generator stops the generation."""
        return self._stream(calls.stream(user_id, prompt, options))

    def rewrite(self, user_id: str, draft: str, **options: Any) -> Rewritten:
        """Give a draft back in a user's own words; `options` are the other fields of `POST /rewrite`."""
        return self._call(calls.rewrite(user_id, draft, options))

    def adapt(
        self,
        user_id: str,
        samples: Items,
        *,
        append: bool = False,
        idempotency_key: str | None = None,
        **config: Any,
    ) -> Job:
        """Start training a user's adapter on samples with `input` and `output`, or on texts of theirs alone.

        The samples replace the stored ones, or extend them with `append`. `config` has options such as `steps`. The
        same samples are the same job until that fails; the same `idempotency_key` is always the same job.
        """
        return self._call(calls.adapt(user_id, samples, append=append, config=config, idempotency_key=idempotency_key))

    def adapters(self, user_id: str) -> list[dict[str, Any]]:
        """Return the kept versions of a user's adapter, newest first (`GET /users/{id}/adapters`)."""
        return self._call(calls.adapters(user_id))

    def serve(self, user_id: str, version: int) -> dict[str, Any]:
        """Let the kept version of a user's adapter with this number serve instead."""
        return self._call(calls.serve(user_id, version))

    def feedback(self, user_id: str, answer: str, **given: Any) -> Feedback:
        """Say what a user did with an answer, named by its `id`.

        `given` has `outcome`, `rating`, or `final` with `input` and `text` (`POST /users/{id}/feedback`).
        """
        return self._call(calls.feedback(user_id, answer, given))

    def worth(self) -> Worth:
        """Return what personalisation is worth to the users of the key's tenant (`GET /worth`)."""
        return self._call(calls.WORTH)

    def job(self, job_id: str) -> Job:
        return self._call(calls.job(job_id))

    def cancel(self, job_id: str) -> Job:
        """Cancel a job that waits or runs; what is stored stays as it was."""
        return self._call(calls.cancel(job_id))

    def events(self, job_id: str) -> Generator[Job, None, None]:
        """Yield a job now and after each change, until it has ended."""
        return self._stream(calls.events(job_id))

    def wait(self, job_id: str, *, timeout_s: float = 600.0, poll_s: float = 0.1) -> Job:
        """Wait until a job has ended, polling it every `poll_s`."""
        deadline_s = time.monotonic() + timeout_s
        while (job := self.job(job_id)).ended_at is None:
            if time.monotonic() > deadline_s:
                raise calls.timed_out(job, timeout_s)
            time.sleep(poll_s)
        return job

    def _call(self, call: Call[T]) -> T:
        return self._patiently(lambda: self._once(call))

    def _once(self, call: Call[T]) -> T:
        response = self._send(call)
        with call.explained(self.url):
            return call.read(response.json())

    def _stream(self, call: Call[T]) -> Generator[T, None, None]:
        response, events = self._patiently(lambda: self._send(call, stream=True)), Events()
        with closing(response), call.explained(self.url, streaming=True):
            for piece in response.iter_bytes():
                yield from map(call.read, events.feed(piece))
                if events.done:
                    return
        raise calls.broken_off()

    def _send(self, call: Call[T], *, stream: bool = False) -> httpx.Response:
        """Return a 2xx response; the body of a stream is not read yet, and the caller closes it."""
        request = call.request(self._http)
        with call.explained(self.url):
            response = self._http.send(request, stream=stream)
            if response.is_success:
                return response
            with closing(response):
                response.read()
            raise calls.error_of(response)

    def _patiently(self, attempt: Callable[[], R]) -> R:
        patience = Patience(self.retry_s)
        while True:
            try:
                return attempt()
            except MtaError as error:
                if self._stopped.wait(patience.pause_s(error)):
                    raise
