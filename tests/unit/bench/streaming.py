"""A server of a few lines that streams as many tokens as it is asked for, in a thread of its own."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
from aiohttp import web
from aiohttp.test_utils import TestServer

from bench.rig.engine import Engine

TOKEN_S = 0.001


@dataclass(slots=True)
class Seen:
    """What the server was asked, the keys it was shown, and how many streams it had at once."""

    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    loaded: list[str] = field(default_factory=list)
    open: int = 0
    most: int = 0


class Streaming:
    """The server; a context manager. Refuses the model `bad`."""

    def __init__(self) -> None:
        self.seen = Seen()
        self.engine = Engine("", 0, httpx.Client())
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        app = web.Application()
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/load_lora_adapter", self._load)
        self._server = TestServer(app)
        asyncio.run_coroutine_threadsafe(self._server.start_server(), self._loop).result(10)
        url = str(self._server.make_url("")).rstrip("/")
        self.engine = Engine(url, 0, httpx.Client(base_url=url))
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.client.close()
        asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    async def _load(self, request: web.Request) -> web.Response:
        self.seen.loaded.append((await request.json())["lora_name"])
        return web.Response(text="ok")

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.seen.bodies.append(body)
        self.seen.keys.add(request.headers.get("Authorization", ""))
        if body["model"] == "bad":
            return web.json_response({"error": "no such model"}, status=404)
        self.seen.open += 1
        self.seen.most = max(self.seen.most, self.seen.open)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(body["max_tokens"]):
            await asyncio.sleep(TOKEN_S)
            await response.write(f"data: {json.dumps({'choices': [{'text': 'x'}]})}\n\n".encode())
        usage = {"choices": [], "usage": {"completion_tokens": body["max_tokens"], "prompt_tokens": 3}}
        await response.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())
        self.seen.open -= 1
        return response
