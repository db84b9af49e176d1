"""A gateway on a real port, in a thread of the test's own process; API keys."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import MagicMock

import httpx

from bank.lookup.signature import empty_signature
from bench.rig.client import summed
from bench.rig.processes import wait_until
from bench.rig.valkey import free_port
from server.gateway.access.keys import Caller
from server.gateway.app import create_app
from server.gateway.http.serving import GatewayServer, uvicorn_config
from server.gateway.parts import Call, Gateway, Parts
from server.settings import Settings
from server.store.profile_record import AdapterNote, StoredSignature
from server.store.profiles import Change
from server.store.tenants.access_keys import Policy, Scope, access_key, digest_of, new_secret
from server.store.tenants.rates import Allowance
from server.store.tenants.user_key import Tenants
from tests.support.store_parts import StoreParts

SECRET = "a secret that only tests know"


class GatewayThread:
    """Serves `create_app` on a free port, with some settings changed; its context is entered once it answers."""

    def __init__(self, settings: Settings, **changes: object) -> None:
        settings = settings.model_copy(update=changes)
        self.app = create_app(settings)
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._failure: BaseException | None = None
        config = uvicorn_config(self.app, settings)
        config.port, config.timeout_graceful_shutdown = self.port, 2
        self._server = GatewayServer(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._up = threading.Event()

    @property
    def opened(self) -> Gateway:
        return self.app.state.gateway

    @property
    def parts(self) -> Parts:
        return self.opened.default_parts

    def key(self, user_id: str) -> str:
        """The key of a user of the tenant that there is while no API key exists."""
        return self.opened.tenants.users(self.opened.settings.tenant).key(user_id)

    def client(self, timeout_s: float = 30) -> httpx.Client:
        # The thread may set an environment variable while `trust_env` would iterate over all of them.
        return httpx.Client(base_url=self.url, timeout=timeout_s, trust_env=False)

    def send(self, line: str, body: bytes, headers: str = "", length: int = -1, buffer: int = 0) -> socket.socket:
        """A connection over which a request has been sent, the body perhaps in part."""
        sending = socket.socket()
        sending.settimeout(30)
        if buffer:
            sending.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        sending.connect(("127.0.0.1", self.port))
        head = f"{line} HTTP/1.1\r\nHost: localhost\r\n{headers}Content-Type: application/json\r\n"
        head += f"Content-Length: {len(body) if length < 0 else length}\r\n\r\n"
        sending.sendall(head.encode() + body)
        return sending

    def __enter__(self) -> GatewayThread:
        self.thread.start()
        assert self._up.wait(60), "the gateway did not start"
        if self._failure:
            raise self._failure
        return self

    def stop(self) -> None:
        """Begin to stop."""
        self._server.should_exit = True

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.thread.join(30)

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


def call_by(tenant: str) -> Call:
    """A call of a tenant's app at a gateway that is not open."""
    gateway = MagicMock(settings=Settings(), tenants=Tenants(SECRET, tenant))
    gateway.parts_of.return_value.bank.manifest.history_default = 0
    return Call(gateway, Caller(tenant, "", frozenset()))


@contextmanager
def serving(settings: Settings, **changes: object) -> Iterator[httpx.Client]:
    """A client of a gateway of its own, which has seen all that it needs."""
    with GatewayThread(settings, **changes) as gateway, gateway.client() as client:
        wait_until_ready(client)
        yield client


@dataclass(frozen=True, slots=True)
class Keyed:
    """A gateway over a store with API keys; `secrets` are by name."""

    gateway: GatewayThread
    secrets: Mapping[str, str]

    def header(self, key: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.secrets[key]}"}

    def client(self, key: str) -> httpx.Client:
        return httpx.Client(base_url=self.gateway.url, timeout=30, headers=self.header(key), trust_env=False)

    def send(self, key: str, line: str, body: bytes, **options: int) -> socket.socket:
        return self.gateway.send(line, body, f"Authorization: Bearer {self.secrets[key]}\r\n", **options)


def make_keys(
    url: str, keys: Mapping[str, tuple[str, Iterable[Scope], Allowance]], revoked: str = ""
) -> dict[str, str]:
    """Keep API keys of these tenants, scopes and limits in a store; returns their secrets by name."""
    secrets = {name: new_secret() for name in keys}

    async def make() -> None:
        async with StoreParts.opened(url) as parts:
            for name, (tenant, scopes, allowance) in keys.items():
                await parts.keys.add(access_key(secrets[name], name, tenant, frozenset(scopes), Policy(allowance)))
            if revoked:
                await parts.keys.revoke(digest_of(secrets[revoked].encode()), 1)

    asyncio.run(make())
    return secrets


def wait_until_ready(client: httpx.Client) -> None:
    """Return once the gateway has seen all that it needs; it knows the engine's context from then on."""
    wait_until(lambda: client.get("/ready").status_code == httpx.codes.OK, "the gateway to be ready")


def becomes(client: httpx.Client, status: int, *engines: str, detail: str = "") -> dict[str, Any]:
    """Wait until `/ready` has this status, these states of engines and this detail; returns its answer."""
    answer: dict[str, Any] = {}

    def is_so() -> bool:
        response = client.get("/ready")
        answer.update(response.json())
        states = [engine["status"] for engine in answer["parts"]["engines"]]
        return (response.status_code, states) == (status, list(engines)) and detail in str(answer["detail"])

    wait_until(is_so, f"{status}, {engines}, {detail}")
    return answer


def metric(client: httpx.Client, name: str) -> float:
    """The value of a time series, or the sum over its labels if the name has none; 0 if there is none."""
    return summed(client.get("/metrics").raise_for_status().text, name)


def generate(client: httpx.Client, user_id: str, **fields: Any) -> httpx.Response:
    return client.post("/generate", json={"user_id": user_id, "prompt": "hello", "max_tokens": 4} | fields)


def chunks_of(response: httpx.Response) -> list[Any]:
    """The values of a stream's events, `[DONE]` as a string."""
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def content_of(response: httpx.Response) -> str:
    """The text of a chat completion, which must have succeeded."""
    assert response.status_code == httpx.codes.OK, response.text
    return response.json()["choices"][0]["message"]["content"]


def text_of(chunks: list[Any], index: int = 0) -> str:
    """The text of one choice of a stream."""
    choices = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)


async def give_adapter(
    gateway: GatewayThread, user_id: str, tenant: str = "", bank: str = "", *, created_ms: int = 1
) -> None:
    """Note in a profile that there is a user adapter, as promotion does."""
    tenant, bank = tenant or gateway.opened.settings.tenant, bank or gateway.parts.bank.manifest.short
    key = gateway.opened.tenants.users(tenant).key(user_id)
    async with StoreParts.opened(gateway.opened.settings.redis_url) as parts:
        snapshot = await parts.profiles.read(key)
        assert snapshot.profile
        note = AdapterNote("a" * 26, f"mta3:{bank}:shared:c+a01*500", 1, created_ms)
        change = Change(replace(snapshot.profile, adapter=note), {}, {}, ())
        assert await parts.profiles.commit(key, snapshot.version, change, snapshot.epoch)
        await parts.adapters.add_adapted(key, bank)


async def give_phrases(gateway: GatewayThread, user_id: str, table: bytes, bank: str = "") -> None:
    """Keep a phrase table in a profile beside a signature, as a worker of a bank does."""
    key, manifest = gateway.key(user_id), gateway.parts.bank.manifest
    async with StoreParts.opened(gateway.opened.settings.redis_url) as parts:
        snapshot = await parts.profiles.read(key)
        assert snapshot.profile
        made = empty_signature(bank or manifest.short, manifest.personal_rows)
        signed = StoredSignature(made, snapshot.profile.updated_ms)
        change = Change(replace(snapshot.profile, signature=signed, phrases=table), {}, {}, ())
        assert await parts.profiles.commit(key, snapshot.version, change, snapshot.epoch)
