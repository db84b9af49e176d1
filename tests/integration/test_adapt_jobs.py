"""How the jobs go that `POST /users/{id}/adapt` makes: a real gateway, Valkey and worker, a tiny model."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from bench.rig.processes import wait_until
from tests.integration.conftest import Work
from tests.support.adapting import SAMPLES, adapt, job_of
from tests.support.gateway import GatewayThread


def test_of_many_posts_the_newest_samples_win(client: httpx.Client, ada: str, work: Work) -> None:
    newest = [{"input": "which?", "output": f"the {n}th yes yes"} for n in range(10)]
    jobs = [adapt(client, ada, samples=[*SAMPLES, sample]).json() for sample in newest]
    work()
    states = [job_of(client, job)["state"] for job in jobs]
    assert states[:-1] == ["superseded"] * 9
    assert states[-1] in ("succeeded", "rejected")


def test_the_same_idempotency_key_is_the_same_job(client: httpx.Client, ada: str) -> None:
    first, second = (adapt(client, ada, idempotency_key="once").json() for _ in range(2))
    assert first["id"] == second["id"]


@pytest.mark.parametrize("append", [False, True])
def test_repeating_a_post_changes_nothing_while_its_job_goes_well(
    client: httpx.Client, ada: str, work: Work, *, append: bool
) -> None:
    body = {"append": append, "config": {"learning_rate": 0.02}}
    first = adapt(client, ada, **body).json()
    assert adapt(client, ada, **body).json()["id"] == first["id"]
    work()
    assert adapt(client, ada, **body).json()["id"] == first["id"]
    assert job_of(client, first)["state"] == "succeeded"
    other = adapt(client, ada, samples=SAMPLES[:3]).json()
    assert adapt(client, ada, **body).json()["id"] not in (first["id"], other["id"])
    client.delete(f"/users/{ada}").raise_for_status()


def test_a_cancelled_job_is_never_trained_and_cancelled_once(client: httpx.Client, ada: str, work: Work) -> None:
    job = adapt(client, ada).json()
    assert client.delete(f"/jobs/{job['id']}").json()["state"] == "cancelled"
    again = client.delete(f"/jobs/{job['id']}")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "job_ended")
    work()
    assert job_of(client, job)["state"] == "cancelled"


def test_a_job_that_cannot_be_trained_fails_with_the_reason_and_the_old_adapter_stays(
    client: httpx.Client, ada: str, work: Work
) -> None:
    adapt(client, ada, config={"learning_rate": 0.02}).raise_for_status()
    work()
    before = client.get(f"/users/{ada}").json()["adapter"]
    assert before
    almost = [{"input": f"question {n}", "output": "y" * 500} for n in range(3)]  # too long with the chat template
    job = adapt(client, ada, samples=almost).json()
    work()
    failed = job_of(client, job)
    assert (failed["state"], failed["adapter"]) == ("failed", None)
    assert "samples.0 has" in failed["error"]
    assert client.get(f"/users/{ada}").json()["adapter"] == before


def test_the_events_of_a_job_end_with_its_last_state(client: httpx.Client, ada: str, work: Work) -> None:
    job = adapt(client, ada).json()
    work()
    lines = [line for line in client.get(f"/jobs/{job['id']}/events").text.splitlines() if line]
    assert (lines[0], lines[2:]) == ("event: job", ["event: done", "data: [DONE]"])
    assert json.loads(lines[1].removeprefix("data: ")) == job_of(client, job)


def test_while_a_job_trains_its_events_carry_its_curves(
    client: httpx.Client, gateway: GatewayThread, ada: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.worker.training_thread.RENEW_S", 0.02)
    monkeypatch.setattr("server.gateway.routes.jobs._POLL_S", 0.02)
    job, told = adapt(client, ada).json(), list[dict[str, Any]]()

    def follow() -> None:
        with gateway.client() as mine, mine.stream("GET", f"/jobs/{job['id']}/events") as events:
            told.extend(json.loads(line[6:]) for line in events.iter_lines() if line.startswith("data: {"))

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow)
        wait_until(lambda: told, "the first event")
        work(lambda: wait_until(lambda: job_of(client, job)["progress"]["held_out"], "the first look to be stored"))
        following.result(30)
    states = [state["state"] for state in told]
    assert (states[0], states[-1]) == ("queued", job_of(client, job)["state"])
    lengths = [len(state["progress"]["loss"]) for state in told]
    assert lengths == sorted(lengths)
    assert any(state["state"] == "running" and state["progress"]["held_out"] for state in told)
    assert told[-1] == job_of(client, job)


def test_the_jobs_of_a_user_are_listed_with_their_curves_and_gone_with_the_user(
    client: httpx.Client, gateway: GatewayThread, ada: str, work: Work
) -> None:
    jobs = [adapt(client, ada).json()]
    jobs.append(adapt(client, ada, samples=SAMPLES[:3]).json())
    work()
    sent = {"idempotency_key": None, "traceparent": None}
    assert client.get(f"/users/{ada}/export").json()["jobs"] == [job_of(client, job) | sent for job in jobs]
    client.delete(f"/users/{ada}").raise_for_status()
    assert client.get(f"/jobs/{jobs[1]['id']}").status_code == 404
