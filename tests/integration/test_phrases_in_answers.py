"""`words`: the user's own phrases go to the engine with the request, and the answer says how many tokens they moved."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest
from httpx import Client

from bank.lookup.phrases import phrase_table
from bank.manifest import LossDifference
from bench.rig.tiny import PHRASES
from tests.support.calls import NewUser, ask, either, who
from tests.support.fake_engine import FakeEngine, ids_of
from tests.support.gateway import GatewayThread, chunks_of, generate, give_adapter, give_phrases

CHATS = pytest.mark.parametrize("route", ["/generate", "/v1/chat/completions"])
INTERNAL = ("token_ids", "prompt_token_ids", "moved")
UNSURE = LossDifference(mean=-0.1, low=-0.2, high=0.1)


@pytest.fixture
def table(client: Client, ada: str, gateway: GatewayThread) -> bytes:
    """Ada's phrases: the first two of the four words that she is answered with."""
    said = ids_of(generate(client, ada).raise_for_status().json()["text"])
    table = phrase_table([said[:2]] * 2).tobytes()
    asyncio.run(give_phrases(gateway, ada, table))
    return table


def trusting(gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch, **rule: Any) -> None:
    """Change the trust of the gateway's bank; `phrases=None` for a bank that has none."""
    changed = rule if "phrases" in rule else {"phrases": PHRASES.model_copy(update=rule)}
    monkeypatch.setattr(gateway.parts.bank, "manifest", gateway.parts.bank.manifest.model_copy(update=changed))


def is_asked_with_phrases(fake_engine: FakeEngine) -> bool:
    """Whether the engine got a table with the last request; otherwise it is not asked for token ids either."""
    sent = {"vllm_xargs", "return_token_ids"} & fake_engine.seen[-1].body.keys()
    assert len(sent) in (0, 2)
    return bool(sent)


@CHATS
def test_the_engine_gets_table_and_trust(
    client: Client, ada: str, table: bytes, fake_engine: FakeEngine, route: str
) -> None:
    either(client, route, user=ada, words=True).raise_for_status()
    body = fake_engine.seen[-1].body
    sent = {"mta_phrases": base64.b64encode(table).decode(), "mta_trust": list(PHRASES.trust)}
    assert (body["vllm_xargs"], body["return_token_ids"], "words" in body) == (sent, True, False)


@CHATS
@pytest.mark.usefixtures("table")
@pytest.mark.parametrize(("fields", "helps", "sent"), [
    ({}, True, True), ({"words": "auto"}, True, True), ({"words": False}, True, False),
    ({}, False, False), ({"words": "auto"}, False, False), ({"words": True}, False, True),
])  # fmt: skip
def test_auto_is_whether_it_helped_at_the_build(
    client: Client, ada: str, gateway: GatewayThread, fake_engine: FakeEngine, monkeypatch: pytest.MonkeyPatch,
    *, route: str, fields: dict[str, Any], helps: bool, sent: bool,
) -> None:  # fmt: skip
    if not helps:
        trusting(gateway, monkeypatch, gain=UNSURE)
    found = who(either(client, route, user=ada, **fields))
    assert (is_asked_with_phrases(fake_engine), found["phrases"] > 0) == (sent, sent)


@pytest.mark.parametrize("case", ["unknown", "base on request", "no trust", "another bank", "continued", "fallback"])
def test_when_no_phrases_are_sent(
    client: Client, ada: str, new_user: NewUser, table: bytes, fake_engine: FakeEngine,
    *, gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch, case: str,
) -> None:  # fmt: skip
    route, fields = "/v1/chat/completions", {"user": ada, "words": True}
    match case:
        case "unknown":
            fields["user"] = new_user()
        case "base on request":
            fields["personalize"] = "none"
        case "no trust":
            trusting(gateway, monkeypatch, phrases=None)
        case "another bank":
            asyncio.run(give_phrases(gateway, ada, table, bank="00000000"))
        case "continued":
            route = "/v1/completions"
        case "fallback":
            fake_engine.knobs.lacks = lambda model: model != "base"
    found = who(either(client, route, **fields))
    assert (is_asked_with_phrases(fake_engine), found["phrases"], found["moved"]) == (False, 0, 0)


@pytest.mark.usefixtures("table")
def test_an_adapter_of_ones_own_is_no_reason_to_do_without(
    client: Client, ada: str, gateway: GatewayThread, fake_engine: FakeEngine
) -> None:
    fake_engine.knobs.user_adapters = True
    asyncio.run(give_adapter(gateway, ada))
    assert who(generate(client, ada, words=True))["level"] == "stacked"
    assert is_asked_with_phrases(fake_engine)


@pytest.mark.usefixtures("table")
@pytest.mark.parametrize("n", [1, 2])
def test_openais_answers_tell_what_moved_beside_the_choices(client: Client, ada: str, n: int) -> None:
    answer = ask(client, ada, words=True, n=n).raise_for_status().json()
    told = answer.pop("personalization")
    assert (told["phrases"], told["moved"]) == (3, 2 * n)  # each choice says the same
    assert not any(name in part for name in INTERNAL for part in (answer, *answer["choices"]))


@pytest.mark.usefixtures("table")
def test_openais_streams_tell_of_phrases_beside_the_choices(client: Client, ada: str) -> None:
    first, *chunks, _ = chunks_of(ask(client, ada, words=True, stream=True, n=2).raise_for_status())
    told = first.pop("personalization")
    assert (told["phrases"], told["moved"]) == (3, 0)
    parts = [part for chunk in (first, *chunks) for part in (chunk, *chunk["choices"])]
    assert not any(name in part for name in INTERNAL for part in parts)


@pytest.mark.usefixtures("table")
def test_generate_tells_how_many_tokens_phrases_moved(client: Client, ada: str) -> None:
    whole = who(generate(client, ada, words=True))
    assert (whole["phrases"], whole["moved"]) == (3, 2)
    first, *chunks, last, _ = chunks_of(generate(client, ada, words=True, stream=True).raise_for_status())
    assert (first["personalization"]["phrases"], first["personalization"]["moved"]) == (3, 0)
    assert [chunk.get("moved") for chunk in chunks] == [1, 1, None, None]
    assert last["moved"] == 2


def test_who_has_no_phrases_moves_nothing(client: Client, ada: str, fake_engine: FakeEngine) -> None:
    found = who(generate(client, ada, words=True))
    assert (found["phrases"], found["moved"], is_asked_with_phrases(fake_engine)) == (0, 0, False)
