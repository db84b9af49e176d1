"""The fake engine's routes, in a thread of their own."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from adapters.errors import RecipeError
from adapters.recipe import parse_recipe
from server.supervisor.services import free_port
from tests.support.fake_engine.answers import (
    authorised,
    chunk,
    chunks,
    error_answer,
    options_refusal,
    prompt_tokens,
    template_refusal,
    usage_of,
    whole,
    words_of,
)
from tests.support.fake_engine.knobs import Knobs, Seen


@dataclass(slots=True)
class FakeEngine:
    """The server, in a thread with an event loop of its own.

    Attributes:
        knobs: turn them at any time.
        seen: generation requests, in order.
        looks: how often its status was asked for.
        dropped: the users whose adapters it was told to let go of, in order.
        tokenized: the conversations whose tokens it was asked to count, in order.
        port: where it listens; the same after a restart.
    """

    knobs: Knobs = field(default_factory=Knobs)
    seen: list[Seen] = field(default_factory=list)
    looks: int = 0
    dropped: list[str] = field(default_factory=list)
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
        self.dropped.clear()
        self.tokenized.clear()

    def application(self) -> web.Application:
        """Its routes."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/chat/completions", self._generate)
        app.router.add_post("/v1/completions", self._generate)
        app.router.add_post("/tokenize", self._tokenize)
        app.router.add_get("/mta/v1/status", self._status)
        app.router.add_post("/mta/v1/drop", self._drop)
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
            return error_answer(500, "the fake engine was told not to count")
        if self.knobs.strict and (reason := template_refusal(body["messages"])):
            return error_answer(400, reason)
        return web.json_response({"count": prompt_tokens(body)})

    async def _status(self, request: web.Request) -> web.Response:
        self.looks += 1
        if not authorised(request):
            return error_answer(401, "missing or wrong engine key")
        return web.json_response(
            {
                "status": "ok",
                "model": "fake",
                "max_model_len": self.knobs.context,
                "banks": list(self.knobs.banks),
                "max_lora_rank": 8,
                "slots": 8,
                "names": 0,
                **self.knobs.figures,
            }
        )

    async def _drop(self, request: web.Request) -> web.Response:
        if not authorised(request):
            return error_answer(401, "missing or wrong engine key")
        self.dropped.append(json.loads(await request.read())["user_key"])
        return web.json_response({"held": 0})

    async def _generate(self, request: web.Request) -> web.StreamResponse:
        if not authorised(request):
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
            return error_answer(knobs.status, f"the fake engine was told to fail at `{model}`")
        if knobs.lacks(model) or not (model == "base" or self._can_fuse(model)):
            return error_answer(404, f"The model `{model}` does not exist.", "model")
        if knobs.strict and (reason := template_refusal(body.get("messages", []))):
            return error_answer(400, reason)
        if reason := options_refusal(body):
            return error_answer(400, reason)
        prompt = prompt_tokens(body)
        if prompt > knobs.context:
            return error_answer(
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
        words = words_of(seen.body, self.knobs.context)
        for _ in words:
            if seen.tokens == self.knobs.die_after:
                assert request.transport
                request.transport.abort()
            if seen.tokens == self.knobs.fail_after:
                return error_answer(500, "EngineCore died")
            await asyncio.sleep(self.knobs.token_delay_s)
            seen.tokens += 1
        if self.knobs.garbage:
            return web.Response(body=self.knobs.garbage, content_type="application/json")
        return web.json_response(whole(seen, words, self.knobs.finish_reasons))

    async def _stream(self, request: web.Request, seen: Seen) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        usage: dict[str, Any] = {"usage": usage_of(seen)}
        if self.knobs.dies:
            self.knobs.dies -= 1
            assert request.transport
            request.transport.abort()
        for word in words_of(seen.body, self.knobs.context):
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
            while seen.tokens == self.knobs.hold_after:
                await asyncio.sleep(0.01)
            await asyncio.sleep(self.knobs.token_delay_s)
            if not seen.tokens and "messages" in seen.body:  # vLLM opens a message with its first token
                await response.write(chunks(seen, "", **usage))
            await response.write(self.knobs.garbage or chunks(seen, word, **usage))
            seen.tokens += 1
        await response.write(chunks(seen, None, self.knobs.finish_reasons, **usage))
        await response.write(chunk(seen, None, usage=usage_of(seen)) + b"data: [DONE]\n\n")
        return response
