"""The few calls of the HTTP API that the demo makes, as any client would."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from typing import Any

from deploy.demo.children import DemoError

MAX_TOKENS = 80
_TIMEOUT_S = 120


class Refused(DemoError):
    """The server answered with an error; `status` is HTTP's."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Answer:
    """What one user was told.

    Attributes:
        text: the answer.
        cut: whether it was longer than was asked for.
        level: `base` or `merged`.
        anchors: (id, weight) of those who spoke, nearest first.
        ttft_ms: from sending the request until its first token was here.
    """

    text: str
    cut: bool
    level: str
    anchors: tuple[tuple[str, float], ...]
    ttft_ms: float


@dataclass(slots=True)
class Job:
    """A training run, followed to its end.

    Attributes:
        state: how it ended.
        of: steps of all its runs.
        losses: of the last step, each time it was told.
        before, after: held-out loss without and with the adapter.
        seconds: from the request until it had ended.
        error: why it failed; empty otherwise.
    """

    state: str
    of: int
    losses: list[float]
    before: float
    after: float
    seconds: float
    error: str


class Api:
    """A running server.

    Args:
        url: of its gateway.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine

    def ready(self) -> bool:
        """Whether all parts of the server are ready."""
        try:
            with self._send("GET", "/ready") as response:
                return bool(response.status == 200)
        except DemoError:
            return False

    def forget(self, user_id: str) -> None:
        """Erase what an earlier run has left of a user."""
        try:
            self._send("DELETE", f"/users/{user_id}").close()
        except Refused as error:
            if error.status != HTTPStatus.NOT_FOUND:
                raise

    def put_profile(self, user_id: str, lines: Sequence[str]) -> None:
        """Make a user known by what they have written."""
        self._send("PUT", f"/users/{user_id}/profile", {"items": [{"text": line} for line in lines]}).close()

    def adapt(self, user_id: str, samples: Sequence[object], config: object) -> Job:
        """Send samples and follow the job to its end."""
        sent_s = time.perf_counter()
        with self._send("POST", f"/users/{user_id}/adapt", {"samples": samples, "config": config}) as response:
            job = json.load(response)
        losses: list[float] = []
        with self._send("GET", f"/jobs/{job['id']}/events") as response:
            for job in _events(response):
                if job["progress"]["loss"] is not None:
                    losses.append(job["progress"]["loss"])
        return Job(
            state=job["state"],
            of=job["progress"]["of"],
            losses=losses,
            before=job["held_out"]["before"] or 0.0,
            after=job["held_out"]["after"] or 0.0,
            seconds=time.perf_counter() - sent_s,
            error=job["error"] or "",
        )

    def ask(self, user_id: str, question: str, max_tokens: int = MAX_TOKENS) -> Answer:
        """One greedy, streamed answer."""
        body = {
            "user_id": user_id,
            "prompt": question,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
        }
        sent_s = time.perf_counter()
        first_token_s = None
        pieces: list[str] = []
        speaker: dict[str, Any] = {}
        finish_reason = None
        with self._send("POST", "/generate", body) as response:
            for chunk in _events(response):
                if "error" in chunk:
                    raise DemoError(f"the answer to {user_id} broke off: {chunk['error']['message']}")
                speaker = chunk.get("personalization", speaker)
                choice = chunk["choices"][0]
                finish_reason = choice["finish_reason"]
                if piece := choice["delta"].get("content"):
                    first_token_s = first_token_s or time.perf_counter()
                    pieces.append(piece)
        ttft_ms = ((first_token_s or time.perf_counter()) - sent_s) * 1000
        anchors = tuple((anchor["id"], anchor["weight"]) for anchor in speaker["anchors"])
        return Answer("".join(pieces).strip(), finish_reason == "length", speaker["level"], anchors, ttft_ms)

    def _send(self, method: str, path: str, body: object = None) -> HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            response: HTTPResponse = self._opener.open(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            with error:
                reason = error.read(2000).decode("utf-8", "replace")
            raise Refused(f"{method} {path} was answered with {error.code}: {reason}", error.code) from error
        except (OSError, HTTPException) as error:
            raise DemoError(f"{method} {path} got no answer from {self.url}: {error}") from error
        return response


def _events(response: HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event, up to `[DONE]`; comments and empty lines are passed over."""
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        yield json.loads(data)
    raise DemoError("the server closed the stream in the middle of an answer")
