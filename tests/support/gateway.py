"""A gateway on a real port, in a thread of the test's own process, so that its parts can be looked at."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from types import TracebackType
from typing import Any

import httpx
import uvicorn

from bench.rig.processes import wait_until
from bench.rig.valkey import free_port
from server.gateway.app import create_app
from server.gateway.http.serving import uvicorn_config
from server.gateway.parts import Gateway, Parts
from server.settings import Settings
from server.store.profile_record import AdapterNote
from server.store.profiles import Change, ProfileStore
from server.store.redis.servers.connection import RedisConnection

SECRET = "a secret that only tests know"


class GatewayThread:
    """Serves `create_app(settings)`; a context manager that returns once it answers.

    Args:
        settings: of the gateway; its port is ignored.
    """

    def __init__(self, settings: Settings) -> None:
        self.app = create_app(settings)
        self.port = free_port()
        self._failure: BaseException | None = None
        config = uvicorn_config(self.app, settings)
        config.port, config.timeout_graceful_shutdown = self.port, 2
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._up = threading.Event()

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def parts(self) -> Parts:
        """What it is made of."""
        gateway: Gateway = self.app.state.gateway
        return gateway.usual

    @property
    def thread(self) -> threading.Thread:
        """Whose event loop answers."""
        return self._thread

    def key(self, user_id: str) -> str:
        """What stands for a user of the tenant that there is while no key exists."""
        return self.parts.tenants.users(self.parts.settings.tenant).key(user_id)

    def client(self, timeout_s: float = 30) -> httpx.Client:
        """A client for it."""
        return httpx.Client(base_url=self.url, timeout=timeout_s)

    def __enter__(self) -> GatewayThread:
        self._thread.start()
        assert self._up.wait(60), "the gateway did not start"
        if self._failure:
            raise self._failure
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(30)

    async def _serve(self) -> None:
        try:
            async with self.app.router.lifespan_context(self.app):
                serving = asyncio.create_task(self._server.serve())
                while not self._server.started and not serving.done():
                    await asyncio.sleep(0.01)
                self._up.set()
                await serving
        except BaseException as failure:
            self._failure = failure
        finally:
            self._up.set()


def wait_until_ready(client: httpx.Client) -> None:
    """Return once the gateway has seen all that it needs; it knows the engine's context from then on."""
    wait_until(lambda: client.get("/ready").status_code == httpx.codes.OK, "the gateway to be ready")


def generate(client: httpx.Client, user_id: str, **fields: Any) -> httpx.Response:
    """A short answer for a user."""
    return client.post("/generate", json={"user_id": user_id, "prompt": "hello", "max_tokens": 4} | fields)


def chunks_of(response: httpx.Response) -> list[Any]:
    """The values of a stream's events, `[DONE]` as a string."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def text_of(chunks: list[Any]) -> str:
    """The text of a stream."""
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if isinstance(chunk, dict))


async def give_adapter(gateway: GatewayThread, user_id: str) -> None:
    """Note in a profile that there is a user adapter, as promotion does."""
    connection = RedisConnection(gateway.parts.settings.redis_url)
    await connection.check()
    store, key = ProfileStore(connection), gateway.key(user_id)
    snapshot = await store.read(key)
    assert snapshot.profile
    note = AdapterNote("a" * 26, f"mta3:{gateway.parts.bank.manifest.short}:shared:c+a01*500", 1, 1)
    change = Change(replace(snapshot.profile, adapter=note), {}, {}, ())
    await store.commit(key, snapshot.version, change, snapshot.epoch)
    await connection.close()
