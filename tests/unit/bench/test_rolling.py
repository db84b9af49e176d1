"""What the load on a rolled fleet counts as a request that failed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import httpx
import pytest

from bench.fleet import rolling
from bench.rig.processes import wait_until

ANSWER = httpx.Response(200, text='{"recipe":"mta3:00000000:shared:c"}\n\ndata: [DONE]')


def load(monkeypatch: pytest.MonkeyPatch, answers: Callable[[], httpx.Response]) -> rolling.Load:
    """Somebody who asks two gateways that answer so."""
    monkeypatch.setattr(rolling, "PAUSE_S", 0.001)
    monkeypatch.setattr(httpx.Client, "request", lambda *_, **__: answers())
    asking = rolling.Load(["http://one", "http://other"], seed=0)
    asking.start()
    return asking


@pytest.mark.parametrize(
    ("error", "failed"),
    [
        (httpx.ReadTimeout("timed out"), True),
        (httpx.WriteError("broken pipe"), True),
        (httpx.RemoteProtocolError("peer closed connection without sending complete message body"), True),
        (httpx.DecodingError("not gzip"), True),
        (httpx.ConnectError("refused"), False),
        (httpx.ConnectTimeout("timed out"), False),
        (httpx.RemoteProtocolError("Server disconnected without sending a response."), False),
    ],
)
def test_what_broke_has_failed_and_who_gets_no_connection_at_one_gateway_asks_the_other(
    error: Exception, failed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = itertools.cycle((True, False))

    def every_other() -> httpx.Response:
        if next(turns):
            raise error
        return ANSWER

    asking = load(monkeypatch, every_other)
    wait_until(lambda: asking.recipes.total() > 1 and len(asking.failures) >= 2 * failed, "two of each", 10)
    asking.stop()
    assert bool(asking.failures) is failed
    assert all(repr(error) in failure for failure in asking.failures)


def test_an_answer_that_does_not_end_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rolling, "ANSWER_S", 0.05)
    asked, over = threading.Event(), threading.Event()

    def hanging() -> httpx.Response:
        asked.set()
        over.wait()
        return ANSWER

    asking = load(monkeypatch, hanging)
    asked.wait(5)
    asking.stop()
    over.set()
    assert len(asking.failures) == 1
