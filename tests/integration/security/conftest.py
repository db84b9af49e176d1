"""A gateway where keys exist: several tenants, every scope alone, and one that was revoked."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from bench.rig.valkey import ValkeyProcess
from server.cli import app
from server.settings import Settings
from server.store.tenants.access_keys import Scope
from server.store.tenants.rates import NO_OVERRIDES, Allowance
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, Keyed, make_keys

APP = frozenset((Scope.GENERATE, Scope.WRITE, Scope.ADAPT))
KEYS: Mapping[str, tuple[str, frozenset[Scope], Allowance]] = {
    **{tenant: (tenant, APP, NO_OVERRIDES) for tenant in ("acme", "globex", "default")},
    "revoked": ("acme", frozenset(Scope), NO_OVERRIDES),
    **{f"only {scope}": ("acme", frozenset((scope,)), NO_OVERRIDES) for scope in Scope},
    **{f"no {scope}": ("acme", frozenset(Scope) - {scope}, NO_OVERRIDES) for scope in Scope},
}


def ask(
    client: httpx.Client, route: str, headers: Mapping[str, str] | list[tuple[str, str]], user: str = "ada"
) -> httpx.Response:
    """A request that a route would take, but for the key; `route` as in the table of routes."""
    method, path = route.split(" ")
    path = path.replace("{user_id}", user).replace("{job_id}", f"{'a' * 26}.1").replace("{path:path}", "app.js")
    path = path.replace("{model:path}", "mta").replace("{response_id}", "resp-1").replace("{version}", "1")
    bodies: dict[str, Any] = {
        "/generate": {"user_id": user, "prompt": "Hello", "max_tokens": 2},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
        "/v1/completions": {"prompt": "Hello", "max_tokens": 2},
        "/v1/responses": {"input": "Hello", "max_output_tokens": 2},
        "/v1/messages": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2},
        f"/users/{user}/profile": {"items": [{"text": "a text"}]},
        f"/users/{user}/profile/items": {"items": [{"text": "a text"}]},
        f"/users/{user}/adapt": {"samples": [{"input": "Hello", "output": "Hello, dear friend"}]},
    }
    return client.request(method, path, json=bodies.get(path), headers=headers)


def keys(*arguments: str) -> Result:
    """`mta keys` in a wide terminal."""
    return CliRunner().invoke(app, ["keys", *arguments], env={"COLUMNS": "300"})


def create(*arguments: str) -> tuple[str, str]:
    """A new key and its id."""
    made = keys("create", *arguments)
    assert made.exit_code == 0, made.output
    found = re.search(r"key ([0-9a-f]{12}) ", made.stderr)
    assert found
    return made.stdout.strip(), found[1]


@pytest.fixture
def environment(store: ValkeyProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the store."""
    monkeypatch.setenv("MTA_REDIS_URL", store.url)


@pytest.fixture(scope="module")
def keyed(gateway_settings: Settings, store: ValkeyProcess, fake_engine_server: FakeEngine) -> Iterator[Keyed]:
    """A gateway over a store of its own, with all of `KEYS`."""
    secrets = make_keys(store.url, KEYS, revoked="revoked")
    fake_engine_server.reset()
    with GatewayThread(gateway_settings, redis_url=store.url) as gateway:
        yield Keyed(gateway, secrets)


@pytest.fixture(scope="module")
def stranger(keyed: Keyed) -> httpx.Client:
    """A client without a key."""
    return keyed.gateway.client()


@pytest.fixture(scope="module")
def acme(keyed: Keyed) -> httpx.Client:
    return keyed.client("acme")


@pytest.fixture(scope="module")
def globex(keyed: Keyed) -> httpx.Client:
    return keyed.client("globex")


@pytest.fixture
def shared_name(acme: httpx.Client, new_user: Callable[[], str]) -> str:
    """A user id that acme has a profile and a job for, and that globex could call by the same name."""
    user_id = new_user()
    items = {"items": [{"text": "The swell was perfect at dawn, so we surfed until noon."}]}
    acme.put(f"/users/{user_id}/profile", json=items).raise_for_status()
    ask(acme, "POST /users/{user_id}/adapt", {}, user_id).raise_for_status()
    return user_id
