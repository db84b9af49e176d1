"""Checks of samples that need the engine, before a job is created: chat template and number of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from httpx import Client, Response

from bench.rig.valkey import ValkeyProcess
from server.settings import Settings
from tests.support.calls import NewUser, adapt, error_of
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, wait_until_ready


def conversation(*roles: str) -> dict[str, Any]:
    return {"input": [{"role": role, "content": "hello"} for role in roles], "output": "a"}


def samples(count: int, output: str) -> list[dict[str, str]]:
    return [{"input": f"{n}", "output": output} for n in range(count)]


def with_steps(client: Client, user_id: str, steps: int, given: list[dict[str, str]], **fields: Any) -> Response:
    return adapt(client, user_id, samples=given, config={"steps": steps}, **fields)


@pytest.fixture(scope="module")
def small(gateway_settings: Settings, fake_engine_server: FakeEngine, store: ValkeyProcess) -> Iterator[GatewayThread]:
    """A gateway whose jobs may read few tokens; they are in a store of their own, since no worker trains them."""
    fake_engine_server.reset()
    changed = {"job_tokens": 20_000, "job_seconds": 60, "redis_url": store.url}
    with GatewayThread(gateway_settings.model_copy(update=changed)) as gateway:
        with gateway.client() as client:
            wait_until_ready(client)  # from now on it knows the engine's context of 512
        yield gateway


@pytest.fixture
def strict(small: GatewayThread, fake_engine: FakeEngine) -> Iterator[Client]:
    """A client of it; it has asked nothing yet, and the engine has a strict template."""
    fake_engine.knobs.strict = True
    small.parts.adapting.checks._accepted.clear()
    with small.client() as client:
        yield client


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (("user", "system", "user"), "the system message must come first"),
        (("user", "user"), "after user comes another role"),
        (("system", "user", "assistant", "assistant", "user"), "after assistant comes another role"),
    ],
)
def test_template_refusals_make_no_job(strict: Client, new_user: NewUser, roles: tuple[str, ...], reason: str) -> None:
    user_id, good = new_user(), [{"input": "q", "output": "a"}, conversation("system", "user")]
    response = adapt(strict, user_id, samples=[*good, conversation(*roles)])
    assert error_of(response) == (400, "samples.2.input", "refused_by_template")
    assert reason in response.json()["error"]["message"]
    assert strict.get(f"/users/{user_id}").status_code == 404  # nothing is stored


def test_each_sequence_of_roles_is_checked_once(strict: Client, new_user: NewUser, fake_engine: FakeEngine) -> None:
    talks = [conversation(*["user", "assistant"] * turns, "user") for turns in range(30)]
    for _ in range(2):
        response = adapt(strict, new_user(), samples=[*talks, *talks, conversation("user", "user")])
        assert error_of(response)[1] == "samples.60.input"
    assert len(fake_engine.tokenized) == 30 + 2
    assert fake_engine.tokenized[0] == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "a"}]


def test_unchecked_samples_are_taken_once(strict: Client, new_user: NewUser, fake_engine: FakeEngine) -> None:
    for counts, status in ((False, 202), (True, 400)):
        fake_engine.knobs.counts = counts
        assert adapt(strict, new_user(), samples=[conversation("user", "user")]).status_code == status


def test_too_many_steps_are_refused_with_how_many_fit(strict: Client, new_user: NewUser) -> None:
    user_id, given = new_user(), samples(10, "x" * 99)
    response = with_steps(strict, user_id, 500, given)
    assert error_of(response) == (400, "config.steps", "job_too_large")
    message = response.json()["error"]["message"]
    assert "851000 tokens" in message  # 3 runs of 500 steps of 4 samples, 251 looks at 10 of them, 100 each
    assert "20000 are allowed" in message
    fitting = int(message.rpartition("with ")[2].partition(" steps")[0])
    assert with_steps(strict, user_id, fitting + 1, given).status_code == 400
    job = with_steps(strict, user_id, fitting, given).raise_for_status().json()
    assert (job["config"]["max_tokens"], job["config"]["max_seconds"]) == (20_000, 60)
    assert strict.get(f"/jobs/{job['id']}").json()["config"] == job["config"]
    response = adapt(strict, user_id, samples=samples(500, "x" * 500))  # a single step is too much
    assert error_of(response) == (400, "samples", "job_too_large")


def test_tokens_are_counted_if_needed(strict: Client, new_user: NewUser, fake_engine: FakeEngine) -> None:
    given = [{"input": "?", "output": "😀" * 30}] * 10  # four bytes, one token here
    with_steps(strict, new_user(), 16, given).raise_for_status()
    assert len(fake_engine.tokenized) == 11
    fake_engine.knobs.counts = False
    assert with_steps(strict, new_user(), 16, given).status_code == 400


def test_kept_samples_count_too(strict: Client, new_user: NewUser) -> None:
    user_id, more = new_user(), samples(4, "y" * 400)
    with_steps(strict, user_id, 4, samples(2, "x" * 400)).raise_for_status()
    assert error_of(with_steps(strict, user_id, 4, more, append=True))[1] == "config.steps"
    with_steps(strict, user_id, 2, more, append=True).raise_for_status()
    with_steps(strict, user_id, 4, more).raise_for_status()
