"""Feedback through the API: who may give it on what, what it teaches, and that it goes with the user."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import redis
from httpx import Client

from bank.manifest import BankManifest
from bench.rig.processes import mta, wait_until
from bench.rig.valkey import ValkeyProcess
from server.gateway.experiments.arms import Arm, Level
from server.gateway.generation import answer_ids
from server.gateway.generation.answer_ids import answer_id
from server.gateway.learning import messages
from server.settings import Settings
from server.store.redis import keys
from server.store.tenants.access_keys import Scope
from server.store.tenants.rates import NO_OVERRIDES, Allowance
from server.store.tenants.user_key import UserKeys
from tests.support.calls import FINAL, SAMPLES, NewUser, adapt, ask, error_of, give, put, who
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import (
    SECRET,
    GatewayThread,
    chunks_of,
    generate,
    give_adapter,
    make_keys,
    metric,
    serving,
    text_of,
    wait_until_ready,
)

UNKNOWN = (404, "answer", "unknown_answer")


def answered(client: Client, user_id: str) -> str:
    answer: str = generate(client, user_id).raise_for_status().json()["id"]
    return answer


def export(client: Client, user_id: str) -> dict[str, Any]:
    exported: dict[str, Any] = client.get(f"/users/{user_id}/export").raise_for_status().json()
    return exported


def test_text_sent_for_an_answer_becomes_an_item_and_a_sample(client: Client, new_user: NewUser) -> None:
    user_id = new_user()  # nothing is known of them: feedback makes the profile
    answer = answered(client, user_id)
    said = give(client, user_id, answer, **FINAL).raise_for_status().json()
    assert said == {
        "answer": answer,
        "level": "base",
        "arm": "none",
        "outcome": "edited",
        "rating": None,
        "changed": pytest.approx(0.83, abs=0.1),
        "learned": True,
        "job": None,
    }
    known = export(client, user_id)
    request_id = answer.rpartition(".")[0]
    assert known["items"] == [{"id": request_id, "input": FINAL["input"], "output": FINAL["final"]}]
    (entry,) = known["feedback"]
    sample = {"messages": [{"role": "user", "content": FINAL["input"]}], "output": FINAL["final"]}
    assert (entry["answer"], entry["sample"]) == (request_id, sample)
    assert known["samples"] == []  # those sent to `adapt` are apart
    assert generate(client, user_id).json()["personalization"]["level"] == "merged"


def test_a_rating_without_a_profile_is_exported_and_erased(client: Client, new_user: NewUser) -> None:
    user_id = new_user()
    give(client, user_id, answered(client, user_id), rating="up").raise_for_status()
    known = export(client, user_id)
    assert (known["user_id"], known["items"], known["adapter"]) == (user_id, [], None)
    assert [entry["rating"] for entry in known["feedback"]] == ["up"]
    assert client.delete(f"/users/{user_id}").raise_for_status().json()["erased"]["feedback"] == 1
    assert client.get(f"/users/{user_id}/export").status_code == 404


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_model_said_can_be_sent_back_even_nul(
    client: Client, new_user: NewUser, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.fake_engine.WORDS", ("a\0b\\",) * 12)
    response = generate(client, user_id := new_user(), stream=stream).raise_for_status()
    told = chunks_of(response)[:-1] if stream else [response.json()]
    text, answer = text_of(told) if stream else told[0]["text"], told[0]["id"]
    assert text == "a\N{REPLACEMENT CHARACTER}b\\ " * 4
    give(client, user_id, answer, input="hello", text=text, final=text).raise_for_status()
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": text}]
    generate(client, user_id, prompt=None, messages=[*said, said[0]]).raise_for_status()


def test_feedback_adds_up_and_a_repeated_one_changes_nothing(client: Client, ada: str) -> None:
    answer, before = answered(client, ada), len(export(client, ada)["items"])
    first = give(client, ada, answer, rating="up").json()
    assert (first["rating"], first["outcome"], first["learned"]) == ("up", None, False)
    both = give(client, ada, answer, **FINAL).json()
    assert (both["rating"], both["outcome"], both["level"]) == ("up", "edited", "merged")
    kept = export(client, ada)
    assert give(client, ada, answer, **FINAL).json() == both
    assert export(client, ada) == kept
    assert len(kept["items"]) == before + 1
    give(client, ada, answer, **FINAL | {"final": "The hills."}).raise_for_status()  # they changed their mind
    again = export(client, ada)
    assert len(again["items"]) == before + 1
    assert [entry["sample"]["output"] for entry in again["feedback"]] == ["The hills."]


@pytest.mark.parametrize("by_hash", [False, True])
def test_a_final_text_equal_to_the_answer_teaches_nothing(client: Client, ada: str, by_hash: bool) -> None:
    answer, items = answered(client, ada), len(export(client, ada)["items"])
    text = "I have no plans."
    known = {"sha256": hashlib.sha256(text.encode()).hexdigest()} if by_hash else {"text": text}
    said = give(client, ada, answer, input="any plans?", final=f"{text}\n", **known).json()
    assert (said["outcome"], said["changed"], said["learned"]) == ("sent", 0.0, False)
    assert len(export(client, ada)["items"]) == items
    said = give(client, ada, answer, input="any plans?", final="none", **known).json()
    assert (said["outcome"], said["learned"], said["changed"] is None) == ("edited", True, by_hash)


def test_an_id_is_of_one_user_one_tenant_and_one_life(
    client: Client, ada: str, new_user: NewUser, gateway_settings: Settings
) -> None:
    answer = answered(client, ada)
    request_id, _, ending = answer.rpartition(".")
    stranger, other = new_user(), UserKeys("another secret of a server", "default")
    forged = answer_id(
        other, other.user(ada), "", request_id, level=Level.STACKED, arm=Arm.FULL, recipe="mta3:00000000:shared:c"
    )
    flipped = ending[:5] + ("A" if ending[5] != "A" else "B") + ending[6:]
    swapped = answered(client, ada).rpartition(".")[2]
    for user_id, named in (
        (stranger, answer),
        (ada, forged),
        (ada, request_id),
        (ada, f"{request_id}.{flipped}"),
        (ada, f"{request_id}.{swapped}"),  # the ending of another answer
        (ada, f"{answer}A"),
        (ada, f"{request_id}.{ending[:-4]}"),
        (ada, "gen-1.ü"),
        (ada, ""),
    ):
        assert error_of(give(client, user_id, named, rating="up")) == UNKNOWN, named
    assert give(client, ada, answer, rating="up").status_code == 200
    client.delete(f"/users/{ada}").raise_for_status()
    put(client, ada, [{"text": "back again"}])
    assert error_of(give(client, ada, answer, rating="up")) == UNKNOWN
    answer = answered(client, ada)
    assert give(client, ada, answer, rating="down").status_code == 200
    with redis.from_url(gateway_settings.redis_url) as raw:
        assert raw.delete(keys.epoch(UserKeys(SECRET, "default").key(ada))), "its time is over"
    assert give(client, ada, answer, rating="up").status_code == 200
    client.delete(f"/users/{ada}").raise_for_status()
    assert error_of(give(client, ada, answer, rating="up")) == UNKNOWN


def test_an_id_counts_for_seven_days(client: Client, ada: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, now_s = answered(client, ada), time.time()
    monkeypatch.setattr(time, "time", lambda: now_s + (7 * 24 - 1) * 3600)
    assert give(client, ada, answer, rating="up").status_code == 200
    monkeypatch.setattr(time, "time", lambda: now_s + 7 * 24 * 3600)
    assert error_of(give(client, ada, answer, rating="up")) == (410, "answer", "gone")


def test_which_answers_can_be_named(client: Client, ada: str) -> None:
    assert "." not in generate(client, ada, personalize="none").json()["id"]
    assert "." not in ask(client).json()["id"]
    for streamed in (generate(client, ada, stream=True), ask(client, ada, stream=True)):
        *chunks, _ = chunks_of(streamed)
        (named,) = {chunk["id"] for chunk in chunks}
        assert give(client, ada, named, outcome="discarded").json()["level"] == "merged"
    users = UserKeys(SECRET, "default")
    assert ada not in named and users.key(ada) not in named
    assert answer_ids.read_answer_id(users, users.user(ada), "", named).request_id == named.rpartition(".")[0]


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, (400, "outcome")),
        ({"outcome": "lost"}, (400, "outcome")),
        ({"rating": "up", "text": "alone"}, (400, "final")),
        ({"rating": "up", "text": ""}, (400, "final")),
        (FINAL | {"input": None}, (400, "input")),
        (FINAL | {"text": None}, (400, "text")),
        (FINAL | {"sha256": "0" * 64}, (400, "text")),
        (FINAL | {"outcome": "sent"}, (400, "outcome")),
        (FINAL | {"final": " "}, (400, "final")),
        (FINAL | {"final": "\0"}, (400, "final")),
        (FINAL | {"final": "x" * (64 << 10)}, (400, "final")),
        (FINAL | {"input": [{"role": "assistant", "content": "hello"}]}, (400, "input")),
    ],
)
def test_empty_or_contradictory_feedback_is_refused(
    client: Client, ada: str, body: dict[str, Any], error: tuple[int, str]
) -> None:
    before = export(client, ada)
    assert error_of(give(client, ada, answered(client, ada), **body))[:2] == error
    assert export(client, ada) == before


def test_feedback_goes_with_the_user(client: Client, ada: str) -> None:
    give(client, ada, answered(client, ada), **FINAL).raise_for_status()
    erased = client.delete(f"/users/{ada}").json()["erased"]
    assert (erased["feedback"], erased["samples"], erased["keys"]) == (1, 1, 5)
    assert error_of(client.get(f"/users/{ada}/export"))[0] == 404


def said(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}]}


def learnt(client: Client, user_id: str, count: int) -> list[dict[str, Any]]:
    """The user's items, once there are so many."""
    items: list[dict[str, Any]] = []

    def has_them() -> bool:
        nonlocal items
        response = client.get(f"/users/{user_id}/export")
        items = response.json()["items"] if response.status_code == 200 else []
        return len(items) >= count

    wait_until(has_them, f"{count} items")
    return items


@pytest.mark.parametrize("stream", [False, True])
def test_messages_become_items_if_the_request_asks_for_it(client: Client, new_user: NewUser, stream: bool) -> None:
    user_id, words = new_user(), "honestly the sea was flat all week"
    turns = said(words)["messages"]
    for _ in range(2):  # a conversation is sent again at every turn
        response = ask(client, user_id, messages=turns, learn=True, stream=stream).raise_for_status()
        personalization = chunks_of(response)[0]["personalization"] if stream else response.json()["personalization"]
        assert personalization["learned"] is True
    turns = [*turns, {"role": "assistant", "content": "Flat?"}, {"role": "user", "content": "flat as a plate, really"}]
    ask(client, user_id, messages=turns, learn=True).raise_for_status()
    first, second = learnt(client, user_id, 2)
    assert (first["text"], second["input"], second["output"]) == (words, "Flat?", "flat as a plate, really")
    for fields in ({}, {"learn": False}, {"learn": True, "model": "base"}, {"learn": True, "personalize": "none"}):
        answer = ask(client, user_id, **said("this is never to be learnt, please"), **fields).json()
        assert answer["personalization"]["learned"] is False
    assert ask(client, user_id, **said("ok"), learn=True).json()["personalization"]["learned"] is False
    assert generate(client, user_id, learn=True, prompt="and now a third message").json()["personalization"]["learned"]
    assert [item.get("text") for item in learnt(client, user_id, 3)][2] == "and now a third message"


def test_nothing_is_learnt_of_a_user_who_is_erased_meanwhile(
    client: Client, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    user_id = new_user()
    fake_engine.turn(hold_after=1)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, client, user_id, **said("this must not be kept anywhere"), learn=True, stream=True)
        wait_until(lambda: bool(fake_engine.seen), "the engine to be asked")
        client.delete(f"/users/{user_id}")
        fake_engine.turn(hold_after=None)
        assert chunks_of(asking.result())[0]["personalization"]["learned"] is True
    ask(client, user_id, **said("a message of their second life"), learn=True).raise_for_status()
    assert [item["text"] for item in learnt(client, user_id, 1)] == ["a message of their second life"]


def test_answer_slower_than_erasure_memory_teaches_nothing(
    client: Client, new_user: NewUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_id = new_user()
    late = partial(metric, client, 'mta_unlearned_messages_total{reason="late"}')
    before = late()
    with monkeypatch.context() as patched:
        patched.setattr(messages, "MAX_AGE_S", 0)
        ask(client, user_id, **said("this comes far too late"), learn=True).raise_for_status()
        ask(client, new_user(), **said("and this one comes far too late as well"), learn=True).raise_for_status()
        wait_until(lambda: late() == before + 2, "both to be counted")
    ask(client, user_id, **said("a message that comes in time"), learn=True).raise_for_status()
    assert [item["text"] for item in learnt(client, user_id, 1)] == ["a message that comes in time"]


def test_after_so_many_new_texts_a_user_is_adapted_again(gateway_settings: Settings, new_user: NewUser) -> None:
    user_id = new_user()
    with GatewayThread(gateway_settings, refresh_samples=2) as own, own.client() as client:

        def taught(number: int) -> bool:
            said = give(client, user_id, answered(client, user_id), **FINAL | {"final": f"wave number {number}"})
            return said.raise_for_status().json()["job"] is not None

        assert [taught(number) for number in range(4)] == [False, True, False, False]  # a job is open
        (job,) = export(client, user_id)["jobs"]
        assert job["state"] == "queued"
        client.delete(f"/jobs/{job['id']}").raise_for_status()
        assert not taught(4)  # not yet: a day has to pass
        at_once = own.opened.settings.model_copy(update={"refresh_hours": 0})
        own.parts.feedbacks.refreshing.settings = at_once
        seen_ms = export(client, user_id)["feedback"][-1]["at_ms"]
        asyncio.run(give_adapter(own, user_id, created_ms=seen_ms))
        assert [taught(number) for number in (5, 6)] == [False, True]  # what the adapter has seen does not count


def test_a_refresh_is_a_job_of_the_key_that_brings_it(
    gateway_settings: Settings, store: ValkeyProcess, new_user: NewUser
) -> None:
    keys = {"one job": (Scope, Allowance(jobs=1)), "may not": ((Scope.GENERATE, Scope.WRITE), NO_OVERRIDES)}
    secrets = make_keys(store.url, {name: (gateway_settings.tenant, *given) for name, given in keys.items()})
    with serving(gateway_settings, redis_url=store.url, refresh_samples=1) as client:

        def refreshed(name: str) -> bool:
            client.headers["Authorization"] = f"Bearer {secrets[name]}"
            user_id = new_user()
            return (
                give(client, user_id, answered(client, user_id), **FINAL).raise_for_status().json()["job"] is not None
            )

        assert [refreshed(name) for name in ("may not", "one job", "one job")] == [False, True, False]
        assert adapt(client, new_user()).status_code == 429


def test_held_out_users_are_answered_one_level_lower_and_told(
    gateway_settings: Settings, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    fake_engine.turn(user_adapters=True)
    seen = dict[tuple[str, str], dict[str, Any]]()
    with GatewayThread(gateway_settings, holdout=0.5) as own, own.client() as client:
        wait_until_ready(client)
        for number in range(24):
            user_id = new_user()
            assert answered_as(client, user_id)["arm"] == "none"  # nobody knows them
            put(client, user_id, [{"text": "up at five"}])
            if number % 2:
                asyncio.run(give_adapter(own, user_id))
            first = answered_as(client, user_id)
            assert answered_as(client, user_id)["arm"] == first["arm"]  # for the week
            seen["stacked" if number % 2 else "merged", first["arm"]] = first
            for chosen in ({"personalize": "merged"}, {"strength": 0.5}):
                assert answered_as(client, user_id, **chosen)["arm"] == "none"
    levels = {kind: who["level"] for kind, who in seen.items()}
    assert levels == {
        ("stacked", "full"): "stacked",
        ("stacked", "lower"): "merged",
        ("merged", "full"): "merged",
        ("merged", "lower"): "common",
    }
    assert seen["merged", "lower"]["recipe"].endswith(":shared:c")
    assert "MTA_HOLDOUT" in seen["merged", "lower"]["reason"]


def answered_as(client: Client, user_id: str, **fields: Any) -> dict[str, Any]:
    return who(generate(client, user_id, **fields))


def test_an_answer_that_a_fallback_spoke_is_in_no_arm(
    client: Client, ada: str, gateway: GatewayThread, gateway_settings: Settings, fake_engine: FakeEngine
) -> None:
    asyncio.run(give_adapter(gateway, ada))
    assert give(client, ada, answered(client, ada), rating="up").json()["level"] == "merged"
    fake_engine.turn(user_adapters=True)
    spoken = give(client, ada, answered(client, ada), rating="up").json()
    assert (spoken["level"], spoken["arm"]) == ("stacked", "none")  # nobody is held out
    with GatewayThread(gateway_settings, holdout=1e-9) as own, own.client() as holding_out:
        spoken = give(holding_out, ada, answered(holding_out, ada), rating="up").json()
        assert (spoken["level"], spoken["arm"]) == ("stacked", "full")
        fake_engine.turn(lacks=lambda model: ":u-" in model)
        spoken = give(holding_out, ada, answered(holding_out, ada), rating="up").json()
        assert (spoken["level"], spoken["arm"]) == ("merged", "none")


def test_feedback_does_not_touch_the_samples_of_a_job(client: Client, ada: str) -> None:
    job = client.post(f"/users/{ada}/adapt", json={"samples": SAMPLES}).raise_for_status().json()
    give(client, ada, answered(client, ada), **FINAL).raise_for_status()
    client.post(f"/users/{ada}/adapt", json={"samples": SAMPLES[:2]}).raise_for_status()  # replaces its own alone
    known = export(client, ada)
    assert (len(known["samples"]), len(known["feedback"])) == (2, 1)
    assert client.get(f"/jobs/{job['id']}").json()["state"] == "superseded"


def test_key_defaults_apply_unless_the_request_overrides_them(
    gateway_settings: Settings, store: ValkeyProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BankManifest, "history_default", 1)
    command = mta("keys", "create", "chat", "--learn", "--history", "--refresh", "1", "--holdout", "0.5")
    made = subprocess.run(
        command, env=os.environ | {"MTA_REDIS_URL": store.url}, capture_output=True, text=True, check=True
    )
    plain = make_keys(store.url, {"plain": (gateway_settings.tenant, Scope, NO_OVERRIDES)})["plain"]
    with serving(gateway_settings, redis_url=store.url) as client:
        words = "honestly the sea was flat all week"
        found = dict[str, Any]()
        for name, secret in (("plain", plain), ("chat", made.stdout.strip())):
            client.headers["Authorization"] = f"Bearer {secret}"
            put(client, name, [{"input": "how is the sea?", "output": "flat"}])
            answer = ask(client, name, **said(words)).json()
            given = give(client, name, answer["id"], **FINAL).json()
            found[name] = answer["personalization"] | {"job": given["job"] is not None}
            assert not ask(client, name, **said(words), learn=False, history=0).json()["personalization"]["history"]
    assert [found["plain"][what] for what in ("learned", "history", "arm", "job")] == [False, 0, "none", False]
    assert [found["chat"][what] for what in ("learned", "history", "job")] == [True, 1, True]
    assert found["chat"]["arm"] in {"full", "lower"}
