"""The public client against a real gateway over a fake engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.rig.processes import wait_until
from bench.rig.tiny import world
from mta_client import Client, MtaError
from tests.support.calls import SAMPLES, NewUser
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread


@pytest.fixture
def api(gateway: GatewayThread, fake_engine: FakeEngine) -> Iterator[Client]:
    with Client(gateway.url) as api:
        wait_until(api.ready, "the gateway to be ready")
        yield api


def test_a_user_from_the_first_item_to_the_last(api: Client, new_user: NewUser) -> None:
    assert api.health()["status"] == "ok"
    user_id = f"{new_user()}?a=%2F&ü#é"
    put = api.put_profile(user_id, [world(0), {"id": "b", "text": world(0)}])
    assert (put.user_id, put.received, put.kept, put.changed) == (user_id, 2, 2, 2)
    added = api.add_items(user_id, [world(2)])
    assert (added.received, added.kept, added.changed) == (1, 3, 1)
    user = api.user(user_id)
    assert (user.items, user.recipe, user.anchors, user.adapter) == (3, added.recipe, added.anchors, None)
    erased = api.forget(user_id)
    assert (erased.erased["items"], api.forget(user_id)) == (3, erased)
    assert api.forget(new_user(), missing_ok=True) is None
    with pytest.raises(MtaError, match="unknown") as failure:
        api.forget(new_user())
    assert (failure.value.status, failure.value.code, failure.value.param) == (404, "not_found", "user_id")


def test_whole_and_streamed_answers_say_the_same(api: Client, ada: str) -> None:
    answer = api.generate(ada, "hello", max_tokens=4, temperature=0)
    first, *pieces, last = api.stream(ada, "hello", max_tokens=4, temperature=0)
    assert "".join(piece.text for piece in pieces) == answer.text != ""
    assert (answer.personalization.level, answer.personalization.reason) == ("merged", None)
    assert first.personalization.anchors == answer.personalization.anchors == api.user(ada).anchors
    assert (last.usage, last.finish_reason) == (answer.usage, answer.finish_reason)
    assert last.timings_ms.keys() >= {"engine_ttft", "total"}
    assert answer.personalization.timings_ms["total"] > 0


def test_a_refusal_says_which_field_is_at_fault(api: Client, ada: str) -> None:
    for call in (api.generate, lambda *question, **options: next(api.stream(*question, **options))):
        with pytest.raises(MtaError, match="temperature must be") as failure:
            call(ada, "hello", temperature=-1)
        failed = failure.value
        assert (failed.status, failed.code, failed.param) == (400, "invalid_value", "temperature")


def test_samples_become_a_job(api: Client, new_user: NewUser) -> None:
    user_id = new_user()
    first = api.adapt(user_id, SAMPLES, rank=1, steps=3)
    assert (first.state, first.ended_at, first.adapter, first.error) == ("queued", None, None, None)
    assert next(api.events(first.id)) == first
    second = api.adapt(user_id, SAMPLES[:2], append=True)
    assert api.wait(first.id).state == "superseded"
    assert [job.state for job in api.events(first.id)] == ["superseded"]
    with pytest.raises(MtaError, match="still queued") as failure:
        api.wait(second.id, timeout_s=0)
    assert (failure.value.status, failure.value.code) == (0, "timed_out")
    api.forget(user_id)
