"""One request to any route, and how it ended."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import httpx

from mta_client import MtaError
from mta_client.calls import Events


class End(StrEnum):
    """How a request ended."""

    ANSWERED = "answered"
    REFUSED = "refused with a clear error"
    BROKEN = "broken off with a clear error amid its stream"
    CUT = "connection lost"
    UNCLEAR = "neither answer nor clear error"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one request. Times are of the monotonic clock.

    Attributes:
        what: method and route.
        begun_s, ended_s: start and end time.
        end: how it ended.
        reason: the error's code, or another description.
        streaming: whether a part of the answer had arrived before the end.
    """

    what: str
    begun_s: float
    ended_s: float
    end: End
    reason: str = ""
    streaming: bool = False


def ask(client: httpx.Client, method: str, path: str, body: object = None, headers: Any = None) -> tuple[Outcome, Any]:
    """Send a request without streaming; return its outcome and the answer, if any."""
    begun_s, answer = time.monotonic(), None
    try:
        response = client.request(method, path, json=body, headers=headers)
        end, reason, answer = _judged(response)
    except httpx.TransportError as error:
        end, reason = End.UNCLEAR if isinstance(error, httpx.TimeoutException) else End.CUT, repr(error)
    return Outcome(f"{method} {path}", begun_s, time.monotonic(), end, reason), answer


def stream(client: httpx.Client, path: str, body: object, headers: Any = None) -> Outcome:
    """Send a streamed generation."""
    begun_s, pieces = time.monotonic(), 0
    end, reason = End.UNCLEAR, "the stream ended without [DONE]"
    try:
        with client.stream("POST", path, json=body, headers=headers) as response:
            if not response.is_success:
                response.read()
                end, reason, _ = _judged(response)
            else:
                events = Events()
                for piece in response.iter_bytes():
                    for _ in events.feed(piece):
                        pieces += 1
                if events.done:
                    end, reason = End.ANSWERED, ""
    except MtaError as error:
        end, reason = End.BROKEN, error.code
    except httpx.TransportError as error:
        end, reason = End.UNCLEAR if isinstance(error, httpx.TimeoutException) else End.CUT, repr(error)
    return Outcome(f"POST {path}, streamed", begun_s, time.monotonic(), end, reason, pieces > 0)


def _judged(response: httpx.Response) -> tuple[End, str, Any]:
    try:
        answer = response.json()
        if response.is_success:
            return End.ANSWERED, "", answer
        return End.REFUSED, str(answer["error"]["code"]), answer
    except (ValueError, LookupError, TypeError):
        return End.UNCLEAR, f"HTTP {response.status_code}: {response.text[:200]!r}", None
