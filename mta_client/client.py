"""The HTTP API, one method per call."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx

from mta_client.results import Answer, Chunk, Erased, Feedback, Job, MtaError, Profile, User, Worth, read, read_chunk

if TYPE_CHECKING:
    from mta_client.results import T

Items = Sequence[str | Mapping[str, Any]]
"""Texts, or items with the fields of the bank's task."""

Prompt = str | Sequence[Mapping[str, str]]
"""One user turn, or a conversation of messages."""

CONNECT_S = 5.0
KEEP_ALIVE_S = 2.0  # the server closes idle connections after 5 s


class Client:
    """A thread-safe client for one server. Methods raise only `MtaError`.

    `timeout_s` is the longest wait for data within an answer; a healthy stream sends some at least every 15 s. `key`
    defaults to MTA_API_KEY from the environment. Other options go to `httpx.Client`, for example `verify`.
    """

    def __init__(self, url: str, *, timeout_s: float = 120.0, key: str | None = None, **options: Any) -> None:
        self.url = url
        if key := key or os.environ.get("MTA_API_KEY"):
            options["headers"] = {"Authorization": f"Bearer {key}", **options.get("headers", {})}
        timeout, limits = httpx.Timeout(timeout_s, connect=CONNECT_S), httpx.Limits(keepalive_expiry=KEEP_ALIVE_S)
        self._http = httpx.Client(base_url=url, timeout=timeout, limits=limits, **options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ready(self) -> bool:
        """Return whether the server can fully serve requests (`GET /ready`)."""
        with suppress(MtaError):
            return bool(self._json("GET", "/ready"))
        return False

    def health(self) -> dict[str, Any]:
        """Return the last known state of the server's parts (`GET /health`)."""
        return self._json("GET", "/health")

    def put_profile(self, user_id: str, items: Items) -> Profile:
        """Replace a user's history with these items."""
        return self._call(Profile, "PUT", f"{_path('users', user_id)}/profile", {"items": _items(items)})

    def add_items(self, user_id: str, items: Items) -> Profile:
        """Add items to a user's history, replacing items with the same `id`."""
        return self._call(Profile, "POST", f"{_path('users', user_id)}/profile/items", {"items": _items(items)})

    def user(self, user_id: str) -> User:
        """Return a summary of a user's stored data, and the anchors that serve them."""
        return self._call(User, "GET", _path("users", user_id))

    def export(self, user_id: str) -> dict[str, Any]:
        """Return all stored data of a user (`GET /users/{id}/export`)."""
        return self._json("GET", f"{_path('users', user_id)}/export")

    def forget(self, user_id: str, *, missing_ok: bool = False) -> Erased | None:
        """Erase a user; with `missing_ok`, return None if nothing is stored about them."""
        try:
            return self._call(Erased, "DELETE", _path("users", user_id))
        except MtaError as error:
            if missing_ok and error.status == httpx.codes.NOT_FOUND:
                return None
            raise

    def generate(self, user_id: str, prompt: Prompt, **options: Any) -> Answer:
        """Generate an answer; `options` are the other fields of `POST /generate`, for example `max_tokens`."""
        return self._call(Answer, "POST", "/generate", _generate_body(user_id, prompt) | options)

    def stream(self, user_id: str, prompt: Prompt, **options: Any) -> Generator[Chunk, None, None]:
        """Stream an answer; closing the generator stops the generation."""
        body = _generate_body(user_id, prompt) | options | {"stream": True}
        with self._response("POST", "/generate", body) as response:
            for event in _events(response):
                yield read_chunk(event)

    def adapt(self, user_id: str, samples: Sequence[Mapping[str, Any]], *, append: bool = False, **config: Any) -> Job:
        """Start training a user's adapter on samples with `input` and `output`.

        The samples replace the stored ones, or extend them with `append`. `config` has options such as `steps`.
        """
        body = {"samples": _dicts(samples), "append": append, "config": config}
        return self._call(Job, "POST", f"{_path('users', user_id)}/adapt", body)

    def feedback(self, user_id: str, answer: str, **given: Any) -> Feedback:
        """Say what a user did with an answer, named by its `id`.

        `given` has `outcome`, `rating`, or `final` with `input` and `text` (`POST /users/{id}/feedback`).
        """
        return self._call(Feedback, "POST", f"{_path('users', user_id)}/feedback", {"answer": answer, **given})

    def worth(self) -> Worth:
        """Return what personalisation is worth to the users of the key's tenant (`GET /worth`)."""
        return self._call(Worth, "GET", "/worth")

    def events(self, job_id: str) -> Generator[Job, None, None]:
        """Yield a job now and after each change, until it has ended."""
        with self._response("GET", f"{_path('jobs', job_id)}/events") as response:
            for event in _events(response):
                yield read(Job, event)

    def wait(self, job_id: str, *, timeout_s: float = 600.0, poll_s: float = 0.1) -> Job:
        """Wait until a job has ended, polling it every `poll_s`."""
        deadline_s = time.monotonic() + timeout_s
        while (job := self._call(Job, "GET", _path("jobs", job_id))).ended_at is None:
            if time.monotonic() > deadline_s:
                raise MtaError(f"job {job_id} is still {job.state} after {timeout_s:.0f} s", "timed_out")
            time.sleep(poll_s)
        return job

    def _call(self, kind: type[T], method: str, path: str, body: object = None) -> T:
        with self._response(method, path, body) as response:
            return read(kind, json.loads(response.read()))

    def _json(self, method: str, path: str) -> dict[str, Any]:
        with self._response(method, path) as response:
            return dict(json.loads(response.read()))

    @contextmanager
    def _response(self, method: str, path: str, body: object = None) -> Iterator[httpx.Response]:
        """Send a request and yield its 2xx response; turn every failure into an `MtaError`."""
        with _sendable():
            request = self._http.build_request(method, path, json=body)
        try:
            response = self._http.send(request, stream=True)
            try:
                if not response.is_success:
                    response.read()
                    raise _error_of(response)
                yield response
            finally:
                response.close()
        except httpx.HTTPError as error:
            raise MtaError(f"{method} {path} got no answer from {self.url}: {error}", "no_answer") from error
        except (ValueError, LookupError, TypeError) as error:
            raise MtaError(
                f"{method} {path} got an answer that this client cannot read: {error!r}", "not_understood"
            ) from error


def _error_of(response: httpx.Response) -> MtaError:
    """Return the error in a 4xx or 5xx answer, which may come from a proxy."""
    retry_after = response.headers.get("Retry-After", "")
    details: dict[str, Any] = {
        "status": response.status_code,
        "retry_after_s": float(retry_after) if retry_after.isdecimal() else None,
    }
    try:
        error = response.json()["error"]
        return MtaError(error["message"], error["code"], param=error["param"], **details)
    except (ValueError, LookupError, TypeError):
        return MtaError(response.text[:2000], "not_understood", **details)


@contextmanager
def _sendable() -> Iterator[None]:
    """Turn errors caused by the caller's arguments into an `MtaError`; also used as a decorator."""
    try:
        yield
    except (TypeError, ValueError, RecursionError, httpx.InvalidURL) as error:
        raise MtaError(f"this cannot be sent: {error}", "not_sendable") from error


@_sendable()
def _path(kind: str, identifier: str) -> str:
    return f"/{kind}/{quote(identifier, safe='')}"


@_sendable()
def _items(items: Items) -> list[dict[str, Any]]:
    return [{"text": item} if isinstance(item, str) else dict(item) for item in items]


@_sendable()
def _dicts(mappings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [dict(one) for one in mappings]


def _generate_body(user_id: str, prompt: Prompt) -> dict[str, Any]:
    return {"user_id": user_id, **({"prompt": prompt} if isinstance(prompt, str) else {"messages": _dicts(prompt)})}


def _events(response: httpx.Response) -> Iterator[Mapping[str, Any]]:
    """Yield the JSON of each server-sent event up to `[DONE]`; skip comments and empty lines."""
    for line in _lines(response):
        if line.startswith(b"data: [DONE]"):
            return
        if line.startswith(b"data:"):
            event = json.loads(line.removeprefix(b"data:"))
            if isinstance(error := event.get("error"), Mapping):
                raise MtaError(error["message"], error["code"], param=error["param"])
            yield event
    raise MtaError("the server closed the stream before its end", "broken_off")


def _lines(response: httpx.Response) -> Iterator[bytes]:
    """Yield lines split at newlines only; `Response.iter_lines` also splits at characters that may occur in text."""
    rest = b""
    for piece in response.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
