"""`strength`: how loudly the anchors speak beside the common row."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from adapters.recipe import parse_recipe
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, give_adapter


@pytest.fixture(params=["/generate", "/v1/chat/completions", "/v1/completions"])
def ask(request: pytest.FixtureRequest, client: httpx.Client) -> Any:
    turn = {"messages": [{"role": "user", "content": "hello"}]} if "chat" in request.param else {"prompt": "hello"}
    name = "user_id" if request.param == "/generate" else "user"
    return lambda user, **fields: client.post(request.param, json={**turn, "max_tokens": 4, name: user, **fields})


def test_it_is_a_factor_on_the_banks_own_weights(ask: Any, ada: str) -> None:
    full, half, none = (
        ask(ada, strength=strength).raise_for_status().json()["personalization"] for strength in (1, 0.5, 0)
    )
    assert full["recipe"] == ask(ada).json()["personalization"]["recipe"]
    sums = [sum(term.weight for term in parse_recipe(who["recipe"]).terms) for who in (full, half)]
    assert sums[1] == round(sums[0] / 2)
    assert half["reason"] is None  # there is no adapter that it could not be served with
    assert (none["recipe"].rpartition(":")[2], none["anchors"], none["level"]) == ("c", [], "merged")
    assert [anchor["id"] for anchor in half["anchors"]] == [anchor["id"] for anchor in full["anchors"]]


def test_below_1_a_stacked_user_is_merged(ask: Any, ada: str, gateway: GatewayThread, fake_engine: FakeEngine) -> None:
    fake_engine.knobs.user_adapters = True
    asyncio.run(give_adapter(gateway, ada))
    assert ask(ada, strength=1).json()["personalization"]["level"] == "stacked"
    who = ask(ada, strength=0.95).json()["personalization"]
    reason = "strength is below 1, and the user's adapter is served on its own recipe only"
    assert (who["level"], who["reason"]) == ("merged", reason)
    assert ":u-" not in fake_engine.seen[-1].body["model"]


def test_other_values_are_refused_and_without_a_common_row_only_1_is_taken(
    ask: Any, ada: str, gateway: GatewayThread, *, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    for strength in (-0.05, 1.05, 0.33, "1", True):
        error = ask(ada, strength=strength).json()["error"]
        assert (error["type"], error["param"]) == ("invalid_request_error", "strength")
    assert fake_engine.seen == []
    bank = gateway.parts.bank
    monkeypatch.setattr(bank, "manifest", bank.manifest.model_copy(update={"common": False}))
    refused = ask("nobody", strength=0.5)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "strength")
    assert ask("nobody", strength=1).status_code == 200
