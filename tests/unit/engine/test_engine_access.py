"""Which routes of the engine are open, to whom, and how it stops."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from bench.rig.processes import PATIENCE_S
from server.engine.admission.access import KEYED_ROUTES, PUBLIC_ROUTES, AccessMiddleware, Drain

KEYS = [b"first-key", b"second-key"]


async def knock(method: str, path: str, authorization: bytes | None = None, **changes: Any) -> int:
    sent: list[Any] = []

    async def behind(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [] if authorization is None else [(b"authorization", authorization)]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": headers}
    drain = changes.pop("drain", None) or Drain(0)
    await AccessMiddleware(behind, changes.pop("keys", lambda: KEYS), drain)(scope | changes, None, send)  # type: ignore[arg-type]
    return int(sent[0].get("status", sent[0].get("code")))


@pytest.mark.parametrize(("method", "path"), sorted(KEYED_ROUTES))
async def test_a_route_of_the_product_opens_to_each_key_and_to_nothing_else(method: str, path: str) -> None:
    for key in KEYS:
        assert await knock(method, path, b"Bearer " + key) == 200
        assert await knock(method, path, b"bearer " + key) == 200
    almost = (b"Bearer first-key ", b"Bearer FIRST-KEY", b"first-key", b"\xff\xfe")
    for wrong in (None, b"", b"Bearer", b"Bearer ", *almost):
        assert await knock(method, path, wrong) == 401
    assert await knock(method, path, b"Bearer ", keys=list) == 401


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "get"])
async def test_no_other_method_opens_with_a_key_or_without(method: str) -> None:
    for path in sorted({path for _, path in PUBLIC_ROUTES | KEYED_ROUTES}):
        assert await knock(method, path, b"Bearer first-key") == await knock(method, path) == 404


async def test_a_websocket_is_refused_as_soon_as_it_knocks() -> None:
    assert await knock("GET", "/health", type="websocket") == 1008


async def test_an_engine_that_is_to_stop_sends_everybody_on_to_another() -> None:
    drain = Drain(0, stop=lambda: None)
    assert await knock("GET", "/health", drain=drain) == 200
    drain.start()
    assert await knock("GET", "/health", drain=drain) == 503
    assert await knock("POST", "/v1/chat/completions", b"Bearer first-key", drain=drain) == 503
    assert await knock("POST", "/v1/chat/completions", b"Bearer wrong", drain=drain) == 401


@pytest.mark.parametrize("timeout_s", [PATIENCE_S, 0.01])
async def test_it_stops_once_what_it_had_begun_is_done_or_its_time_is_up(timeout_s: float) -> None:
    stopped = asyncio.Event()
    drain = Drain(timeout_s, stop=stopped.set)
    with drain.request():
        with drain.request():
            drain.start()
            drain.start()
        if timeout_s < 1:
            await asyncio.wait_for(stopped.wait(), PATIENCE_S)
            return
        for _ in range(10):
            await asyncio.sleep(0)
        assert not stopped.is_set()
    await asyncio.wait_for(stopped.wait(), PATIENCE_S)
