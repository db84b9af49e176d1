"""What the engine knows of samples is asked before there is a job: what its template takes, how long a job would be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from server.settings import Settings
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, wait_until_ready

NewUser = Callable[[], str]
GOOD = {"input": "q", "output": "a"}


def conversation(*roles: str) -> dict[str, Any]:
    return {"input": [{"role": role, "content": "hello"} for role in roles], "output": "a"}


def adapt(client: httpx.Client, user_id: str, *samples: dict[str, Any], **fields: Any) -> httpx.Response:
    return client.post(f"/users/{user_id}/adapt", json={"samples": list(samples), **fields})


@pytest.fixture(scope="module")
def small(gateway_settings: Settings, fake_engine_server: FakeEngine) -> Iterator[GatewayThread]:
    """A gateway that lets jobs read little."""
    fake_engine_server.reset()
    with GatewayThread(gateway_settings.model_copy(update={"job_tokens": 20_000, "job_seconds": 60})) as gateway:
        with gateway.client() as client:
            wait_until_ready(client)  # it knows the engine's context of 512
        yield gateway


@pytest.fixture
def strict(small: GatewayThread, fake_engine: FakeEngine) -> Iterator[httpx.Client]:
    """It has asked nothing yet, and the engine has a strict template."""
    fake_engine.knobs.strict = True
    small.parts.adapting.checks._accepted.clear()
    with small.client() as client:
        yield client


@pytest.fixture
def new_user(new_user: NewUser, strict: httpx.Client) -> Iterator[NewUser]:
    """Users who are erased afterwards: no worker of another test shall train for them."""
    made: list[str] = []

    def make() -> str:
        made.append(new_user())
        return made[-1]

    yield make
    for user_id in made:
        strict.delete(f"/users/{user_id}")


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (("user", "system", "user"), "the system message must come first"),
        (("user", "user"), "after user comes another role"),
        (("system", "user", "assistant", "assistant", "user"), "after assistant comes another role"),
    ],
)
def test_messages_that_the_template_refuses_are_named_and_make_no_job(
    strict: httpx.Client, new_user: NewUser, roles: tuple[str, ...], reason: str
) -> None:
    user_id = new_user()
    response = adapt(strict, user_id, GOOD, conversation("system", "user"), conversation(*roles))
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "samples.2.input", "refused_by_template")
    assert reason in error["message"]
    assert strict.get(f"/users/{user_id}").status_code == 404  # nothing is kept of them


def test_each_sequence_of_roles_is_asked_about_once_however_many_there_are(
    strict: httpx.Client, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    talks = [conversation(*["user", "assistant"] * turns, "user") for turns in range(30)]
    for _ in range(2):
        response = adapt(strict, new_user(), *talks, *talks, conversation("user", "user"), config={"steps": 1})
        assert response.json()["error"]["param"] == "samples.60.input"
    assert len(fake_engine.tokenized) == 30 + 2
    hello = {"content": "hello"}
    assert fake_engine.tokenized[0] == [{"role": "user"} | hello, {"role": "assistant", "content": "a"}]


def test_where_the_engine_cannot_say_the_job_is_taken_and_it_is_asked_again_the_next_time(
    strict: httpx.Client, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    fake_engine.knobs.counts = False
    assert adapt(strict, new_user(), conversation("user", "user")).status_code == 202
    fake_engine.knobs.counts = True
    assert adapt(strict, new_user(), conversation("user", "user")).status_code == 400


def test_more_steps_than_the_budget_has_are_refused_with_how_many_fit(strict: httpx.Client, new_user: NewUser) -> None:
    user_id, samples = new_user(), [{"input": f"{n}", "output": "x" * 99} for n in range(10)]
    response = adapt(strict, user_id, *samples, config={"steps": 500})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "config.steps", "job_too_large")
    assert "851000 tokens" in error["message"]  # 3 runs of 500 steps of 4 samples, 251 looks at 10 of them, 100 each
    assert "20000 are allowed" in error["message"]
    fitting = int(error["message"].rpartition("with ")[2].partition(" steps")[0])
    assert adapt(strict, user_id, *samples, config={"steps": fitting + 1}).status_code == 400
    job = adapt(strict, user_id, *samples, config={"steps": fitting}).raise_for_status().json()
    assert (job["config"]["max_tokens"], job["config"]["max_seconds"]) == (20_000, 60)
    assert strict.get(f"/jobs/{job['id']}").json()["config"] == job["config"]


def test_samples_of_which_a_single_step_is_too_much_are_refused(strict: httpx.Client, new_user: NewUser) -> None:
    response = adapt(strict, new_user(), *[{"input": f"{n}", "output": "x" * 500} for n in range(500)])
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, "samples", "job_too_large")


def test_tokens_are_counted_where_bytes_are_too_many(
    strict: httpx.Client, new_user: NewUser, fake_engine: FakeEngine
) -> None:
    samples = [{"input": "?", "output": "😀" * 30} for _ in range(10)]  # four bytes, one token here
    adapt(strict, new_user(), *samples, config={"steps": 16}).raise_for_status()
    assert len(fake_engine.tokenized) == 11
    fake_engine.knobs.counts = False
    assert adapt(strict, new_user(), *samples, config={"steps": 16}).status_code == 400


def test_samples_that_are_kept_count_as_well(strict: httpx.Client, new_user: NewUser) -> None:
    user_id, samples = new_user(), [{"input": f"{n}", "output": "x" * 400} for n in range(2)]
    adapt(strict, user_id, *samples, config={"steps": 4}).raise_for_status()
    more = [{"input": f"{n}", "output": "y" * 400} for n in range(4)]
    response = adapt(strict, user_id, *more, append=True, config={"steps": 4})
    assert response.json()["error"]["param"] == "config.steps"
    adapt(strict, user_id, *more, append=True, config={"steps": 2}).raise_for_status()
    adapt(strict, user_id, *more, config={"steps": 4}).raise_for_status()
