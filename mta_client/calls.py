"""What is common to both clients: the requests, how their answers are read, and when they are repeated."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from mta_client.results import (
    Answer,
    Chunk,
    Erased,
    Feedback,
    Job,
    MtaError,
    Profile,
    Rewritten,
    User,
    Worth,
    read,
    read_chunk,
)

if TYPE_CHECKING:
    from mta_client.results import T as D

T = TypeVar("T")

Items = Sequence[str | Mapping[str, Any]]  # texts, or items with the fields of the bank's task
Prompt = str | Sequence[Mapping[str, str]]  # one user turn, or a conversation of messages
CONNECT_S = 5.0
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 30.0


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request, and what makes a value of the JSON in its answer, or in each event of a stream."""

    method: str
    path: str
    read: Callable[[Mapping[str, Any]], T]
    body: object = None

    def request(self, http: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        with sendable():
            return http.build_request(self.method, self.path, json=self.body)

    @contextmanager
    def explained(self, url: str, *, streaming: bool = False) -> Iterator[None]:
        """Turn the failures of sending a request and reading its answer, or a stream, into an `MtaError`."""
        try:
            yield
        except httpx.HTTPError as error:
            if streaming:
                raise broken_off() from error
            code = "not_sendable" if isinstance(error, httpx.UnsupportedProtocol) else "no_answer"
            raise MtaError(f"{self.method} {self.path} got no answer from {url}: {error}", code) from error
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise MtaError(
                f"{self.method} {self.path} got an answer that this client cannot read: {error!r}", "not_understood"
            ) from error


@dataclass(slots=True)
class Patience:
    """Decides how long a call waits before it is repeated, for up to `retry_s` seconds."""

    retry_s: float
    _since_s: float = field(default_factory=time.monotonic)
    _pause_s: float = _FIRST_PAUSE_S

    def pause_s(self, error: MtaError) -> float:
        """Return the seconds to wait: as long as the server asks, else twice as long each time; or raise the error."""
        pause_s = self._pause_s if error.retry_after_s is None else error.retry_after_s
        self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)
        waited_s = time.monotonic() - self._since_s
        if not error.is_transient or waited_s + pause_s > self.retry_s:
            raise error
        return pause_s * random.uniform(1, 1.2)


def http_options(key: str | None, timeout_s: float, options: Mapping[str, Any]) -> dict[str, Any]:
    key = key or os.environ.get("MTA_API_KEY")
    headers = {"Authorization": f"Bearer {key.strip()}"} if key else {}
    timeout = httpx.Timeout(timeout_s, connect=CONNECT_S)
    return {"timeout": timeout, **options, "headers": headers | dict(options.get("headers") or {})}


def put_profile(user_id: str, items: Items) -> Call[Profile]:
    return _call(Profile, "PUT", f"{_path('users', user_id)}/profile", {"items": _items(items)})


def add_items(user_id: str, items: Items) -> Call[Profile]:
    return _call(Profile, "POST", f"{_path('users', user_id)}/profile/items", {"items": _items(items)})


def user(user_id: str) -> Call[User]:
    return _call(User, "GET", _path("users", user_id))


def export(user_id: str) -> Call[dict[str, Any]]:
    return Call("GET", f"{_path('users', user_id)}/export", dict)


def forget(user_id: str) -> Call[Erased]:
    return _call(Erased, "DELETE", _path("users", user_id))


def generate(user_id: str, prompt: Prompt, options: Mapping[str, Any]) -> Call[Answer]:
    return _call(Answer, "POST", "/generate", {**_generate_body(user_id, prompt), **options})


def stream(user_id: str, prompt: Prompt, options: Mapping[str, Any]) -> Call[Chunk]:
    return Call("POST", "/generate", read_chunk, {**_generate_body(user_id, prompt), **options, "stream": True})


def rewrite(user_id: str, draft: str, options: Mapping[str, Any]) -> Call[Rewritten]:
    return _call(Rewritten, "POST", "/rewrite", {"user_id": user_id, "draft": draft, **options})


def adapt(user_id: str, samples: Items, **options: object) -> Call[Job]:
    given = {name: value for name, value in options.items() if value is not None}
    return _call(Job, "POST", f"{_path('users', user_id)}/adapt", {"samples": _items(samples), **given})


def adapters(user_id: str) -> Call[list[dict[str, Any]]]:
    return Call("GET", f"{_path('users', user_id)}/adapters", lambda answer: list(answer["adapters"]))


def serve(user_id: str, version: int) -> Call[dict[str, Any]]:
    return Call("POST", f"{_path('users', user_id)}/adapters/{version}/serve", dict)


def feedback(user_id: str, answer: str, given: Mapping[str, Any]) -> Call[Feedback]:
    return _call(Feedback, "POST", f"{_path('users', user_id)}/feedback", {"answer": answer, **given})


def job(job_id: str) -> Call[Job]:
    return _call(Job, "GET", _path("jobs", job_id))


def cancel(job_id: str) -> Call[Job]:
    return _call(Job, "DELETE", _path("jobs", job_id))


def events(job_id: str) -> Call[Job]:
    return _call(Job, "GET", f"{_path('jobs', job_id)}/events")


WORTH: Call[Worth] = Call("GET", "/worth", partial(read, Worth))
HEALTH: Call[dict[str, Any]] = Call("GET", "/health", dict)
READY: Call[bool] = Call("GET", "/ready", bool)


def error_of(response: httpx.Response) -> MtaError:
    """Return the error in a 4xx or 5xx answer that was read; it may come from a proxy."""
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


class Events:
    """Reads the JSON of server-sent events up to `[DONE]`; skips comments and empty lines."""

    def __init__(self) -> None:
        self._rest = b""
        self.done = False

    def feed(self, piece: bytes) -> Iterator[Mapping[str, Any]]:
        """Yield the events that this piece of the body completes.

        Lines end at newlines only: `Response.iter_lines` also splits at characters that may occur in text.
        """
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            self.done = self.done or line.startswith(b"data: [DONE]")
            if line.startswith(b"data:") and not self.done:
                event = json.loads(line.removeprefix(b"data:"))
                if isinstance(error := event.get("error"), Mapping):
                    raise MtaError(error["message"], error["code"], param=error["param"])
                yield event


def broken_off() -> MtaError:
    return MtaError("the server closed the stream before its end", "broken_off")


def timed_out(job: Job, timeout_s: float) -> MtaError:
    return MtaError(f"job {job.id} is still {job.state} after {timeout_s:.0f} s", "timed_out")


@contextmanager
def sendable() -> Iterator[None]:
    """Turn errors caused by the caller's arguments into an `MtaError`; also used as a decorator."""
    try:
        yield
    except (TypeError, ValueError, RecursionError, httpx.InvalidURL) as error:
        raise MtaError(f"this cannot be sent: {error}", "not_sendable") from error


def _call(kind: type[D], method: str, path: str, body: object = None) -> Call[D]:
    return Call(method, path, partial(read, kind), body)


@sendable()
def _path(kind: str, identifier: str) -> str:
    return f"/{kind}/{quote(identifier, safe='')}"


@sendable()
def _items(items: Items) -> list[dict[str, Any]]:
    if isinstance(items, str | Mapping):  # whose letters or names would replace the user's history
        raise TypeError("items and samples must be lists")
    return [{"text": item} if isinstance(item, str) else dict(item) for item in items]


@sendable()
def _dicts(mappings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [dict(one) for one in mappings]


def _generate_body(user_id: str, prompt: Prompt) -> dict[str, Any]:
    return {"user_id": user_id, **({"prompt": prompt} if isinstance(prompt, str) else {"messages": _dicts(prompt)})}
