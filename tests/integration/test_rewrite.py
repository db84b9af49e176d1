"""`POST /rewrite`: a draft reaches the engine as the bank's task words it, and its facts are counted in the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

import mta_client
from bank.items.tasks import get_task
from server.cli import app
from tests.support.calls import NewUser, error_of, give, put
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, chunks_of

DRAFT = "We meet Bob at 10:30."
TASK = get_task("rewrite")


@pytest.fixture
def drafts(rewriting: GatewayThread, fake_engine: FakeEngine) -> Iterator[httpx.Client]:
    with rewriting.client() as client:
        yield client


@pytest.fixture
def writer(drafts: httpx.Client, new_user: NewUser) -> str:
    put(drafts, user := new_user(), [{"text": "Sowed beans by the gate this morning."}])
    return user


def rewrite(client: httpx.Client, user: str, draft: str = DRAFT, **fields: Any) -> httpx.Response:
    return client.post("/rewrite", json={"user_id": user, "draft": draft, "max_tokens": 4} | fields)


def turns_of(fake_engine: FakeEngine) -> list[str]:
    return [seen.body["messages"][-1]["content"] for seen in fake_engine.seen]


def test_a_draft_is_worded_by_the_task(drafts: httpx.Client, writer: str, fake_engine: FakeEngine) -> None:
    answer = rewrite(drafts, writer).raise_for_status().json()
    assert answer["personalization"]["level"] == "merged"
    assert turns_of(fake_engine) == [TASK.input.format(draft=DRAFT)]
    assert answer["kept"] == {"numbers": "0 of 1", "names": "0 of 1"}
    assert (answer["missing"], answer["added"]) == (["10:30", "Bob"], [])
    assert give(drafts, writer, answer["id"], rating="up").status_code == 200


def test_notes_stand_below_the_draft(drafts: httpx.Client, writer: str, fake_engine: FakeEngine) -> None:
    answer = rewrite(drafts, writer, notes=["bring 5 plans", "tea"]).raise_for_status().json()
    assert turns_of(fake_engine) == [TASK.input.format(draft=f"{DRAFT}\nbring 5 plans, tea")]
    assert answer["kept"]["numbers"] == "0 of 2"


def test_the_last_chunk_of_a_stream_says_what_is_kept(drafts: httpx.Client, writer: str) -> None:
    *_, last, _ = chunks_of(rewrite(drafts, writer, stream=True).raise_for_status())
    assert last["missing"] == ["10:30", "Bob"] and last["choices"][0]["finish_reason"] == "length"


class TestChat:
    @pytest.fixture
    def chat(self, drafts: httpx.Client, writer: str) -> Callable[..., httpx.Response]:
        body = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": DRAFT}]}
        body |= {"user": writer, "max_tokens": 4, "rewrite": True}
        return lambda **fields: drafts.post("/v1/chat/completions", json=body | fields)

    def test_the_last_message_is_the_draft(self, chat: Callable[..., httpx.Response], fake_engine: FakeEngine) -> None:
        answer = chat(n=2).raise_for_status().json()
        assert answer["personalization"]["level"] == "merged"
        assert [choice["rewritten"]["missing"] for choice in answer["choices"]] == [["10:30", "Bob"]] * 2
        assert turns_of(fake_engine) == [TASK.input.format(draft=DRAFT)]
        assert fake_engine.seen[-1].body["messages"][0]["content"] == "Be kind."
        assert "rewrite" not in fake_engine.seen[-1].body

    def test_without_it_messages_stay_as_they_are(
        self, chat: Callable[..., httpx.Response], fake_engine: FakeEngine
    ) -> None:
        answer = chat(rewrite=False).raise_for_status().json()
        assert turns_of(fake_engine) == [DRAFT]
        assert "rewritten" not in answer["choices"][0]

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"messages": [{"role": "user", "content": " \n"}]}, "messages"),
            ({"messages": [{"role": "assistant", "content": DRAFT}]}, "messages"),
            ({"learn": True}, "learn"),
        ],
    )
    def test_what_is_no_draft_is_refused(
        self, chat: Callable[..., httpx.Response], fields: dict[str, Any], param: str
    ) -> None:
        assert error_of(chat(**fields))[:2] == (400, param)

    def test_a_bank_for_answers_has_no_drafts(self, client: httpx.Client) -> None:
        body = {"messages": [{"role": "user", "content": DRAFT}], "rewrite": True}
        assert error_of(client.post("/v1/chat/completions", json=body)) == (404, None, "no_rewrite_bank")


def test_a_retry_names_what_was_lost(drafts: httpx.Client, writer: str, fake_engine: FakeEngine) -> None:
    answer = rewrite(drafts, writer, on_loss="retry").raise_for_status().json()
    turn = TASK.input.format(draft=DRAFT)
    assert turns_of(fake_engine) == [turn, f"{turn}\nIt must name: 10:30, Bob"]
    assert answer["missing"] == ["10:30", "Bob"]


def test_nothing_is_asked_again_where_nothing_is_lost(
    drafts: httpx.Client, writer: str, fake_engine: FakeEngine
) -> None:
    answer = rewrite(drafts, writer, "nothing to keep here", on_loss="retry").raise_for_status().json()
    assert len(fake_engine.seen) == 1 and (answer["kept"], answer["missing"]) == ({}, [])


def test_a_loss_can_be_refused(drafts: httpx.Client, writer: str) -> None:
    refused = rewrite(drafts, writer, on_loss="refuse")
    assert error_of(refused) == (422, None, "facts_lost")
    assert "10:30, Bob" in refused.json()["error"]["message"]
    assert rewrite(drafts, writer, "nothing to keep here", on_loss="refuse").status_code == 200


def test_a_draft_is_never_learnt(drafts: httpx.Client, writer: str) -> None:
    assert rewrite(drafts, writer).json()["personalization"]["learned"] is False
    assert error_of(rewrite(drafts, writer, learn=True))[:2] == (400, "learn")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"draft": ""}, "draft"),
        ({"draft": " \n"}, "draft"),
        ({"notes": []}, "notes"),
        ({"notes": [" "]}, "notes.0"),
        ({"draft": "long " * 200}, "draft"),
        ({"stream": True, "on_loss": "retry"}, "on_loss"),
        ({"stream": True, "on_loss": "refuse"}, "on_loss"),
        ({"on_loss": "ask"}, "on_loss"),
        ({"prompt": "hello"}, "prompt"),
    ],
)
def test_what_is_wrong_is_named(drafts: httpx.Client, writer: str, fields: dict[str, Any], param: str) -> None:
    assert error_of(rewrite(drafts, writer, **{"draft": DRAFT} | fields))[:2] == (400, param)


def test_a_bank_of_answers_rewrites_nothing(client: httpx.Client, new_user: NewUser, fake_engine: FakeEngine) -> None:
    assert error_of(rewrite(client, new_user())) == (404, None, "no_rewrite_bank")
    assert fake_engine.seen == []


def test_the_client_and_the_command_rewrite(rewriting: GatewayThread, writer: str) -> None:
    with mta_client.Client(rewriting.url, trust_env=False) as client:
        made = client.rewrite(writer, DRAFT, max_tokens=4)
    assert (made.kept["numbers"], made.missing, made.personalization.level) == ("0 of 1", ["10:30", "Bob"], "merged")
    done = CliRunner().invoke(app, ["rewrite", "--user", writer, "--url", rewriting.url], input=DRAFT)
    assert (
        done.exit_code == 0 and done.stderr == "merged; 0 of 1 numbers kept; 0 of 1 names kept; missing: 10:30, Bob\n"
    )


def test_a_command_without_a_bank_for_drafts_says_what_to_build(gateway: GatewayThread) -> None:
    refused = CliRunner().invoke(app, ["rewrite", "--user", "rosa", "--url", gateway.url], input=DRAFT).exception
    assert "--task rewrite" in str(refused)


def test_what_was_sent_instead_teaches_from_the_answer(
    drafts: httpx.Client, writer: str, rewriting: GatewayThread
) -> None:
    answer = rewrite(drafts, writer).json()
    given = {"input": DRAFT, "text": answer["text"], "final": "Bob at 10:30 then. See you!"}
    assert give(drafts, writer, answer["id"], **given).json()["learned"]
    *_, item = drafts.get(f"/users/{writer}/export").json()["items"]
    assert (item["input"], item["output"]) == (TASK.turn(answer["text"]), "Bob at 10:30 then. See you!")


def test_samples_of_a_bank_for_drafts_are_drafts(drafts: httpx.Client, writer: str) -> None:
    samples = [{"input": DRAFT, "output": "Bob at 10:30."}, {"text": "We sowed the beans by the gate."}]
    drafts.post(f"/users/{writer}/adapt", json={"samples": samples}).raise_for_status()
    first, second = drafts.get(f"/users/{writer}/export").json()["samples"]
    assert first["messages"][-1]["content"] == TASK.turn(DRAFT)
    assert second["messages"][-1]["content"] == TASK.turn("sowed, beans, gate")
