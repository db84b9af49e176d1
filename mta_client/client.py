"""The calls of the HTTP API, one method each."""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import httpx

from mta_client.results import Answer, Chunk, Erased, Job, MtaError, Profile, User, read, read_chunk

if TYPE_CHECKING:
    from mta_client.results import T

Items = Sequence[str | Mapping[str, Any]]
"""Texts, or items with the fields of the bank's task."""

Prompt = str | Sequence[Mapping[str, str]]
"""One user turn, or a conversation of messages."""

CONNECT_S = 5.0
KEEP_ALIVE_S = 2.0  # idle connections are given up before the server closes them, after 5 s


class Client:
    """A server, by its HTTP API. Every method raises `MtaError` and nothing else; threads may share a client.

    Args:
        url: of the gateway.
        timeout_s: longest silence of an answer; a stream is not silent for longer than 15 s while all is well.
        options: of `httpx.Client`, for example `headers`, `verify` or `trust_env`.
    """

    def __init__(self, url: str, *, timeout_s: float = 120.0, **options: Any) -> None:
        self.url = url
        timeout, limits = httpx.Timeout(timeout_s, connect=CONNECT_S), httpx.Limits(keepalive_expiry=KEEP_ALIVE_S)
        self._http = httpx.Client(base_url=url, timeout=timeout, limits=limits, **options)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ready(self) -> bool:
        """Whether requests can be answered as they should be."""
        try:
            self._json("GET", "/ready")
        except MtaError:
            return False
        return True

    def health(self) -> Mapping[str, Any]:
        """The gateway's parts as it last saw them."""
        return self._json("GET", "/health")

    def put_profile(self, user_id: str, items: Items) -> Profile:
        """Let a user's history be these items alone."""
        return self._call(Profile, "PUT", f"{_path(user_id)}/profile", {"items": _items(items)})

    def add_items(self, user_id: str, items: Items) -> Profile:
        """Add items to a user's history; one whose `id` is there already is replaced."""
        return self._call(Profile, "POST", f"{_path(user_id)}/profile/items", {"items": _items(items)})

    def user(self, user_id: str) -> User:
        """What is stored of a user, and who speaks for them."""
        return self._call(User, "GET", _path(user_id))

    def forget(self, user_id: str, *, missing_ok: bool = False) -> Erased | None:
        """Erase a user; with `missing_ok`, None where nothing was stored of them."""
        try:
            return self._call(Erased, "DELETE", _path(user_id))
        except MtaError as error:
            if missing_ok and error.status == httpx.codes.NOT_FOUND:
                return None
            raise

    def generate(self, user_id: str, prompt: Prompt, **options: Any) -> Answer:
        """A whole answer; `options` are the other fields of `POST /generate`, for example `max_tokens`."""
        return self._call(Answer, "POST", "/generate", _question(user_id, prompt) | options)

    def stream(self, user_id: str, prompt: Prompt, **options: Any) -> Generator[Chunk, None, None]:
        """The same as it is made; closing the generator ends the answer."""
        body = _question(user_id, prompt) | options | {"stream": True}
        with self._response("POST", "/generate", body) as response:
            for event in _events(response):
                yield read_chunk(event)

    def adapt(self, user_id: str, samples: Sequence[Mapping[str, Any]], *, append: bool = False, **config: Any) -> Job:
        """Begin to train a user's adapter on samples of `input` and `output`, which replace the last ones.

        Args:
            user_id: whose.
            samples: at least two.
            append: whether they are added to the last ones instead.
            config: of the training, for example `kind` or `steps`.
        """
        body = {"samples": [dict(sample) for sample in samples], "append": append, "config": config}
        return self._call(Job, "POST", f"{_path(user_id)}/adapt", body)

    def events(self, job_id: str) -> Generator[Job, None, None]:
        """A job whenever it has changed, until it has ended."""
        with self._response("GET", f"/jobs/{job_id}/events") as response:
            for event in _events(response):
                yield read(Job, event)

    def wait(self, job_id: str, *, timeout_s: float = 600.0, poll_s: float = 0.1) -> Job:
        """A job once it has ended, looked at every `poll_s`."""
        deadline_s = time.monotonic() + timeout_s
        while (job := self._call(Job, "GET", f"/jobs/{job_id}")).ended_at is None:
            if time.monotonic() > deadline_s:
                raise MtaError(f"job {job_id} is still {job.state} after {timeout_s:.0f} s", "timed_out")
            time.sleep(poll_s)
        return job

    def _call(self, kind: type[T], method: str, path: str, body: object = None) -> T:
        with self._response(method, path, body) as response:
            return read(kind, json.loads(response.read()))

    def _json(self, method: str, path: str) -> Mapping[str, Any]:
        with self._response(method, path) as response:
            return dict(json.loads(response.read()))

    @contextmanager
    def _response(self, method: str, path: str, body: object = None) -> Iterator[httpx.Response]:
        """A response of status 2xx while the block reads it; what goes wrong meanwhile becomes an `MtaError`."""
        request = self._http.build_request(method, path, json=body)
        try:
            response = self._http.send(request, stream=True)
            try:
                if not response.is_success:
                    response.read()
                    raise _refusal(response)
                yield response
            finally:
                response.close()
        except httpx.HTTPError as error:
            raise MtaError(f"{method} {path} got no answer from {self.url}: {error}", "no_answer") from error
        except (ValueError, LookupError, TypeError) as error:
            raise MtaError(f"{method} {path} got an answer of another shape: {error!r}", "not_understood") from error


def _refusal(response: httpx.Response) -> MtaError:
    """What an answer of status 4xx or 5xx says, whoever between us and the server gave it."""
    try:
        error = response.json()["error"]
        return MtaError(error["message"], error["code"], status=response.status_code, param=error["param"])
    except (ValueError, LookupError, TypeError):
        return MtaError(response.text[:2000], "not_understood", status=response.status_code)


def _path(user_id: str) -> str:
    return f"/users/{quote(user_id, safe='')}"


def _items(items: Items) -> list[dict[str, Any]]:
    return [{"text": item} if isinstance(item, str) else dict(item) for item in items]


def _question(user_id: str, prompt: Prompt) -> dict[str, Any]:
    said = {"prompt": prompt} if isinstance(prompt, str) else {"messages": [dict(message) for message in prompt]}
    return {"user_id": user_id, **said}


def _events(response: httpx.Response) -> Iterator[Mapping[str, Any]]:
    """The JSON of each server-sent event, up to `[DONE]`; comments and empty lines are passed over."""
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
    """Lines as server-sent events have them; `Response.iter_lines` also cuts at marks that may stand in a text."""
    rest = b""
    for piece in response.iter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
