"""A stand-in for vLLM with our plugin: the same HTTP, no model, and knobs for what a real one does only by accident.

Its answer is words made from the model's name and the last message, so different recipes and prompts get different
texts. `tests/contract/test_engine.py` holds it and the real one to the same behaviour.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from aiohttp import web

from adapters.errors import RecipeError
from adapters.recipe import FusionMethod, parse_recipe
from bank.manifest import read_manifest
from server.supervisor.services import free_port

KEY = "test-engine-key"
WORDS = ("sea", "board", "rose", "queen", "rye", "steam", "plan", "salt", "wave", "knight", "crumb", "rail")


@dataclass(slots=True)
class Knobs:
    """What a test can turn.

    Attributes:
        banks: fingerprints of the banks that it serves.
        anchors: how many anchors each of them has.
        method: how they are fused.
        context: tokens that prompt and answer may have together; a token is a character of the prompt.
        admit_s: pause before it answers at all.
        token_delay_s: pause before each token.
        die_after: cut the connection after so many tokens.
        fail_after: send an error event after so many tokens.
        garbage: send this instead of a chunk.
        lacks: models that are answered with 404.
        status: HTTP status of every answer, instead of generating.
        user_adapters: whether it has whatever user adapter it is asked for.
        counts: whether it says how many tokens a conversation has.
        strict: whether it has the chat template of `tests.support.tiny`, instead of one that takes everything.
    """

    banks: tuple[str, ...] = ()
    anchors: int = 6
    method: FusionMethod = FusionMethod.SHARED
    context: int = 512
    admit_s: float = 0.0
    token_delay_s: float = 0.0
    die_after: int | None = None
    fail_after: int | None = None
    garbage: bytes | None = None
    lacks: Callable[[str], bool] = lambda model: False
    status: int | None = None
    user_adapters: bool = False
    counts: bool = True
    strict: bool = False


@dataclass(slots=True)
class Seen:
    """One generation request as it arrived, and whether it came to its end or its client left before."""

    body: dict[str, Any]
    headers: dict[str, str]
    peer_port: int
    aborted: bool = False
    ended: bool = False
    tokens: int = 0


@dataclass(slots=True)
class FakeEngine:
    """The server, in a thread with an event loop of its own.

    Attributes:
        knobs: turn them at any time.
        seen: generation requests, in order.
        looks: how often its status was asked for.
        tokenized: the conversations whose tokens it was asked to count, in order.
        port: where it listens; the same after a restart.
    """

    knobs: Knobs = field(default_factory=Knobs)
    seen: list[Seen] = field(default_factory=list)
    looks: int = 0
    tokenized: list[list[dict[str, str]]] = field(default_factory=list)
    port: int = field(default_factory=free_port)
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> FakeEngine:
        """Listen, and return once it does."""
        listening = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(listening,), daemon=True)
        self._thread.start()
        assert listening.wait(10), "the fake engine did not start"
        return self

    def stop(self) -> None:
        """Cut every connection and stop listening, as a killed process would."""
        if self._loop and self._thread:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop = self._thread = None

    def reset(self) -> None:
        """All knobs but the bank's back at rest, nothing seen."""
        self.knobs = Knobs(self.knobs.banks, self.knobs.anchors, self.knobs.method)
        self.seen.clear()
        self.tokenized.clear()

    def application(self) -> web.Application:
        """Its routes."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/mta/v1/status", self._status)
        app.router.add_get("/health", self._health)
        return app

    def _run(self, listening: threading.Event) -> None:
        loop = self._loop = asyncio.new_event_loop()
        runner = web.AppRunner(self.application(), handler_cancellation=True, shutdown_timeout=0)

        async def begin() -> None:
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", self.port, reuse_address=True).start()
            listening.set()

        loop.run_until_complete(begin())
        loop.run_forever()
        if runner.server:
            for connection in runner.server.connections:
                if connection.transport:
                    connection.transport.abort()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response(status=self.knobs.status or 200)

    async def _tokenize(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.knobs.admit_s)
        body = json.loads(await request.read())
        self.tokenized.append(body["messages"])
        if not self.knobs.counts:
            return _error(500, "the fake engine was told not to count")
        if self.knobs.strict and (reason := _template_refusal(body["messages"])):
            return _error(400, reason)
        return web.json_response({"count": _prompt_tokens(body)})

    async def _status(self, request: web.Request) -> web.Response:
        self.looks += 1
        if not _authorised(request):
            return _error(401, "missing or wrong engine key")
        return web.json_response(
            {
                "status": "ok",
                "model": "fake",
                "max_model_len": self.knobs.context,
                "banks": list(self.knobs.banks),
                "max_lora_rank": 8,
                "slots": 8,
                "names": 0,
            }
        )

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if not _authorised(request):
            return web.json_response({"error": "Unauthorized"}, status=401)
        body = json.loads(await request.read())
        seen = Seen(body, dict(request.headers), request.transport.get_extra_info("peername")[1])
        self.seen.append(seen)
        refusal = self._refusal(body)
        try:
            await asyncio.sleep(self.knobs.admit_s)
            answer = refusal or await (self._stream if body.get("stream") else self._whole)(request, seen)
        except (asyncio.CancelledError, ConnectionError):
            seen.aborted = True
            raise
        seen.ended = True
        return answer

    def _refusal(self, body: dict[str, Any]) -> web.Response | None:
        knobs, model = self.knobs, body["model"]
        if knobs.status:
            return _error(knobs.status, f"the fake engine was told to fail at `{model}`")
        if knobs.lacks(model) or not (model == "base" or self._can_fuse(model)):
            return _error(404, f"The model `{model}` does not exist.", "model")
        if knobs.strict and (reason := _template_refusal(body["messages"])):
            return _error(400, reason)
        prompt = _prompt_tokens(body)
        if prompt > knobs.context:
            return _error(
                400,
                f"This model's maximum context length is {knobs.context} tokens. However, your prompt contains "
                f"{prompt} input tokens.",
                "input_tokens",
            )
        return None

    def _can_fuse(self, name: str) -> bool:
        try:
            recipe = parse_recipe(name)
        except RecipeError:
            return False
        known = all(term.anchor < self.knobs.anchors for term in recipe.terms)
        known = known and (self.knobs.user_adapters or recipe.user_adapter is None)
        return known and recipe.method is self.knobs.method and recipe.bank in {bank[:8] for bank in self.knobs.banks}

    async def _whole(self, request: web.Request, seen: Seen) -> web.Response:
        words = _words(seen.body, self.knobs.context)
        for _ in words:
            if seen.tokens == self.knobs.die_after:
                assert request.transport
                request.transport.abort()
            if seen.tokens == self.knobs.fail_after:
                return _error(500, "EngineCore died")
            await asyncio.sleep(self.knobs.token_delay_s)
            seen.tokens += 1
        if self.knobs.garbage:
            return web.Response(body=self.knobs.garbage, content_type="application/json")
        message = {"role": "assistant", "content": "".join(words)}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        return web.json_response({"object": "chat.completion", "choices": [choice], "usage": _usage(seen)})

    async def _stream(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        options = seen.body.get("stream_options") or {}
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        usage: dict[str, Any] = {"usage": _usage(seen)} if options.get("continuous_usage_stats") else {}
        for word in _words(seen.body, self.knobs.context):
            if seen.tokens == self.knobs.die_after:
                assert request.transport
                request.transport.abort()
            if seen.tokens == self.knobs.fail_after:
                failure = {
                    "error": {
                        "message": f"EngineCore died at `{seen.body['model']}`",
                        "type": "InternalServerError",
                        "code": 500,
                    }
                }
                await response.write(b"data: " + json.dumps(failure).encode() + b"\n\ndata: [DONE]\n\n")
                return response
            await asyncio.sleep(self.knobs.token_delay_s)
            if not seen.tokens:  # vLLM opens the answer with its first token
                await response.write(_chunk({"role": "assistant", "content": ""}, **usage))
            await response.write(self.knobs.garbage or _chunk({"content": word}, **usage))
            seen.tokens += 1
        await response.write(_chunk({}, "length", **usage))
        last = {"object": "chat.completion.chunk", "choices": [], "usage": _usage(seen)}
        await response.write(b"data: " + json.dumps(last).encode() + b"\n\ndata: [DONE]\n\n")
        return response


def _authorised(request: web.Request) -> bool:
    return request.headers.get("Authorization") == f"Bearer {KEY}"


def _error(status: int, message: str, param: str | None = None) -> web.Response:
    error = {"message": message, "type": "Error", "param": param, "code": status}
    return web.json_response({"error": error}, status=status)


def _template_refusal(messages: list[dict[str, str]]) -> str | None:
    """What the chat template of `tests.support.tiny` raises."""
    roles = [message["role"] for message in messages]
    if "system" in roles[1:]:
        return "the system message must come first"
    twice = next((role for role, following in pairwise(roles) if role == following), None)
    return f"after {twice} comes another role" if twice else None


def _prompt_tokens(body: dict[str, Any]) -> int:
    return sum(len(message["content"]) for message in body["messages"])


def _usage(seen: Seen) -> dict[str, int]:
    prompt = _prompt_tokens(seen.body)
    return {"prompt_tokens": prompt, "completion_tokens": seen.tokens, "total_tokens": prompt + seen.tokens}


def _words(body: dict[str, Any], context: int) -> list[str]:
    """The answer, cut to what the context leaves, as vLLM cuts it: without a word."""
    length = min(body["max_tokens"], context - _prompt_tokens(body))
    digest = hashlib.sha256(f"{body['model']}\0{body['messages'][-1]['content']}".encode()).digest()
    return [f"{WORDS[digest[i % 32] % len(WORDS)]} " for i in range(length)]


def _chunk(delta: dict[str, str], finish_reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    chunk = {"object": "chat.completion.chunk", "choices": [choice], **more}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def main() -> None:
    """Serve in the foreground: `python -m tests.support.fake_engine --port 8001 --bank FOLDER`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--bank", type=Path, required=True, help="folder of the bank that it pretends to serve")
    parser.add_argument("--token-delay-ms", type=float, default=0)
    options = parser.parse_args()
    manifest = read_manifest(options.bank)
    knobs = Knobs((manifest.fingerprint,), len(manifest.anchors), manifest.method)
    knobs.token_delay_s, knobs.context = options.token_delay_ms / 1000, 8192
    engine = FakeEngine(knobs, port=options.port)
    web.run_app(engine.application(), host="127.0.0.1", port=options.port, print=None, handler_cancellation=True)


if __name__ == "__main__":
    main()
