"""Adapting, from a request through its jobs to a stacked answer: a real gateway, Valkey and worker, a tiny model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis

from adapters.training.adapt_config import AdaptConfig
from bank.manifest import BankManifest
from bench.rig.processes import wait_until
from bench.rig.tiny import world
from bench.rig.valkey import ValkeyProcess
from server.errors import InvalidRequest
from server.gateway.users.adapting import training_config
from server.store.profiles import Change
from server.store.samples import JobBudget
from server.worker.readapting import Readapting, ReadaptTally
from server.worker.training import AdapterTrainer
from tests.integration.conftest import Work, working
from tests.support.adapting import SAMPLES, adapt, job_of
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, generate
from tests.support.store_parts import StoreParts
from tests.support.stored import opened

NewUser = Callable[[], str]
LIVELY = {"learning_rate": 0.02}
"""Learns something in the few steps there are."""


@pytest.fixture(scope="module")
def kai(gateway: GatewayThread, trainer: AdapterTrainer, tiny_bank_folder: Path, valkey: ValkeyProcess) -> str:
    """Somebody with an adapter of their own, whom no test changes."""
    with gateway.client() as client:
        client.put("/users/kai-who-adapted/profile", json={"items": [{"text": world(0)}]}).raise_for_status()
        adapt(client, "kai-who-adapted", config=LIVELY).raise_for_status()
    working(valkey.url, trainer, tiny_bank_folder)()
    return "kai-who-adapted"


@pytest.fixture
def adapted(client: httpx.Client, ada: str, fake_engine: FakeEngine, work: Work) -> str:
    """Ada, who has an adapter that the engine serves."""
    fake_engine.knobs.user_adapters = True
    adapt(client, ada, config=LIVELY).raise_for_status()
    work()
    return ada


def test_a_user_is_answered_by_their_own_adapter_once_it_is_trained(
    client: httpx.Client, ada: str, fake_engine: FakeEngine, work: Work
) -> None:
    fake_engine.knobs.user_adapters = True
    response = adapt(client, ada, config=LIVELY)
    job = response.json()
    assert (response.status_code, response.headers["Location"]) == (202, f"/jobs/{job['id']}")
    assert (job["state"], job["config"]["learning_rate"]) == ("queued", 0.02)
    assert generate(client, ada).json()["personalization"]["level"] == "merged"
    work()
    done = job_of(client, job)
    assert (done["state"], done["tries"], done["error"]) == ("succeeded", 1, None)
    assert done["held_out"]["after"] < done["held_out"]["before"]
    progress = done["progress"]
    assert progress["step"] == progress["steps"] > 0
    assert [step for step, _ in progress["loss"]] == list(range(1, progress["steps"] + 1))
    assert progress["phase"] == "all samples"
    first, second = (loss for step, loss in progress["held_out"] if step in (0, 2))
    assert (len(progress["held_out"]) > 4, first == second) == (True, False)
    who = generate(client, ada).json()["personalization"]
    assert (who["level"], who["reason"]) == ("stacked", None)
    assert fake_engine.seen[-1].body["model"].endswith(f".{done['adapter']}")
    user = client.get(f"/users/{ada}").json()
    adapter = user["adapter"]
    assert (adapter["id"], adapter["stale"]) == (done["adapter"], False)
    assert adapter["recipe"] == who["recipe"]
    assert adapter["bytes"] > 100
    assert generate(client, ada, personalize="merged").json()["personalization"]["level"] == "merged"


@pytest.mark.parametrize("strength", [None, 1, 0])
def test_beneath_a_users_adapter_the_anchors_have_a_share_of_their_strength(
    client: httpx.Client, ada: str, fake_engine: FakeEngine, work: Work, strength: float | None
) -> None:
    fake_engine.knobs.user_adapters = True
    adapt(client, ada, config=LIVELY | {"strength": strength}).raise_for_status()
    work()
    share = AdaptConfig().strength if strength is None else strength
    merged, stacked = (
        sum(anchor["weight"] for anchor in generate(client, ada, personalize=who).json()["personalization"]["anchors"])
        for who in ("merged", "auto")
    )
    assert stacked == pytest.approx(share * merged, abs=0.001)


def test_without_a_common_row_anchors_keep_their_strength_and_less_is_refused(gateway: GatewayThread) -> None:
    lone = gateway.parts.bank.manifest.model_copy(update={"common": False})
    assert training_config(lone, {}).strength == 1
    with pytest.raises(InvalidRequest, match=r"strength 0\.5 needs a common row"):
        training_config(lone, {"strength": 0.5})


def test_an_engine_that_lacks_the_adapter_serves_the_plain_fusion_and_the_answer_says_so(
    client: httpx.Client, kai: str
) -> None:
    who = generate(client, kai).json()["personalization"]
    assert (who["level"], who["reason"]) == ("merged", "the engine cannot serve this user's adapter")
    assert ":u-" not in who["recipe"]


def test_an_adapter_stays_with_its_recipe_when_the_profile_changes(
    client: httpx.Client, adapted: str, fake_engine: FakeEngine
) -> None:
    generate(client, adapted).raise_for_status()
    before = fake_engine.seen[-1].body["model"]
    client.put(f"/users/{adapted}/profile", json={"items": [{"text": world(4)}]}).raise_for_status()
    who = generate(client, adapted).json()["personalization"]
    assert (who["level"], fake_engine.seen[-1].body["model"]) == ("stacked", before)
    assert generate(client, adapted, personalize="merged").json()["personalization"]["recipe"] not in before


def test_clients_are_never_told_whose_adapter_is_stacked_on_a_recipe(
    client: httpx.Client, kai: str, fake_engine: FakeEngine
) -> None:
    fake_engine.knobs.user_adapters = True
    told = [generate(client, kai, stream=stream) for stream in (False, True)] + [client.get(f"/users/{kai}")]
    assert ":u-" in fake_engine.seen[-1].body["model"]
    for status in (400, 418, 500):
        fake_engine.knobs.status = status
        told.append(generate(client, kai))
    fake_engine.knobs.status, fake_engine.knobs.fail_after = None, 0
    told.append(generate(client, kai, stream=True))
    fake_engine.knobs.fail_after = 2
    told.append(generate(client, kai, stream=True))
    assert [answer.status_code for answer in told] == [200, 200, 200, 400, 502, 503, 502, 200]
    for answer in told:
        assert "mta3:" in answer.text
        assert ":u-" not in answer.text


def test_a_user_without_a_profile_gets_one_of_the_samples(client: httpx.Client, new_user: NewUser) -> None:
    user_id = new_user()
    adapt(client, user_id).raise_for_status()
    assert client.get(f"/users/{user_id}").json()["items"] == len(SAMPLES)


def test_erasing_a_user_takes_everything_and_a_running_job_leaves_nothing(
    client: httpx.Client, adapted: str, work: Work, valkey: ValkeyProcess, *, gateway: Any, fake_engine: FakeEngine
) -> None:
    erased = {}
    job = adapt(client, adapted).json()
    work(lambda: erased.update(client.delete(f"/users/{adapted}").json()["erased"]))
    counted = {"items": 3, "samples": len(SAMPLES), "jobs": 2, "adapters": 1}
    assert {name: erased[name] for name in counted} == counted
    assert client.get(f"/jobs/{job['id']}").status_code == 404
    key = gateway.key(adapted)
    assert keys_of(valkey, key) == [f"mta:{{{key}}}:epoch".encode()]
    wait_until(lambda: fake_engine.dropped == [key], "the engine to be told")
    assert generate(client, adapted).json()["personalization"]["level"] == "base"


def test_a_job_of_a_user_who_was_erased_and_made_again_meanwhile_promotes_nothing(
    client: httpx.Client, ada: str, work: Work
) -> None:
    adapt(client, ada, config=LIVELY).raise_for_status()

    def begin_anew() -> None:
        client.delete(f"/users/{ada}").raise_for_status()
        client.put(f"/users/{ada}/profile", json={"items": [{"text": world(1)}]}).raise_for_status()

    work(begin_anew)
    assert client.get(f"/users/{ada}").json()["adapter"] is None
    assert generate(client, ada).json()["personalization"]["level"] == "merged"


def test_after_a_change_of_bank_users_are_merged_at_once_and_adapted_again_from_their_samples(
    client: httpx.Client, ada: str, fake_engine: FakeEngine, work: Work, gateway: GatewayThread
) -> None:
    fake_engine.knobs.user_adapters = True
    key, _, first = adapt(client, ada, config=LIVELY).raise_for_status().json()["id"].partition(".")
    work()
    url = gateway.parts.settings.redis_url
    asyncio.run(_make_stale(url, gateway.key(ada)))
    assert generate(client, ada).json()["personalization"]["level"] == "merged"
    assert client.get(f"/users/{ada}").json()["adapter"]["stale"]
    manifest = gateway.parts.bank.manifest
    for _ in range(2):  # the second time it finds the job there
        counts = asyncio.run(_readapt(url, manifest))
        assert (counts.queued, counts.waiting) == (1, 0)
    job = f"{key}.{int(first) + 1}"
    assert client.get(f"/jobs/{job}").json()["state"] == "queued"
    work()
    assert client.get(f"/jobs/{job}").json()["state"] == "succeeded"
    assert asyncio.run(_readapt(url, manifest)) == ReadaptTally()
    assert generate(client, ada).json()["personalization"]["level"] == "stacked"


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
    body = {"append": append, "config": LIVELY}
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
    adapt(client, ada, config=LIVELY).raise_for_status()
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


async def _make_stale(url: str, key: str) -> None:
    """As if the user's adapter had been trained on an earlier bank."""
    async with opened(url) as profiles:
        snapshot = await profiles.read(key)
        assert snapshot.profile is not None
        assert snapshot.profile.adapter is not None
        note = replace(snapshot.profile.adapter, recipe="mta3:00000000:shared:c")
        await profiles.commit(key, snapshot.version, Change(replace(snapshot.profile, adapter=note), {}, {}, ()))
    with redis.Redis.from_url(url) as raw:
        raw.sadd("mta:adapted", "00000000")
        raw.sadd("mta:adapted:00000000", key)


async def _readapt(url: str, manifest: BankManifest) -> ReadaptTally:
    async with StoreParts.opened(url) as parts:
        room = 1000  # more than other tests leave waiting
        budget = JobBudget(1000, 60)
        stores = parts.jobs, parts.adapters, parts.profiles
        return await Readapting(*stores, manifest=manifest, at_a_time=room, budget=budget).run()


def keys_of(valkey: ValkeyProcess, user_key: str) -> list[bytes]:
    with redis.Redis.from_url(valkey.url) as raw:
        return [key for key in raw.scan_iter() if user_key.encode() in key]
