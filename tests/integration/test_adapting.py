"""Adapting and exporting over a real gateway, Valkey and worker: from samples to a stacked answer and a PEFT folder."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from httpx import Client
from typer.testing import CliRunner

from adapters.recipe import parse_recipe
from bank.items.tasks import get_task
from bank.lookup.phrases import phrase_table
from bank.lookup.signature import Signature
from bank.peft.imported import read_peft
from bench.rig.processes import wait_until
from bench.rig.tiny import world
from bench.rig.valkey import ValkeyProcess
from server.cli import app
from server.errors import InvalidRequest
from server.gateway.routes.users import EXPORTS_AT_ONCE
from server.gateway.users.adapting import training_config
from server.store.profile_record import OtherEmbedding, StoredSignature
from server.store.profiles import Change
from server.store.samples import JobBudget
from server.worker.readapting import Readapting, ReadaptTally
from server.worker.training import AdapterTrainer
from tests.integration.conftest import Work, working
from tests.support.calls import ALL, SAMPLES, NewUser, adapt, either, error_of, job_of, put, who
from tests.support.fake_engine import FakeEngine
from tests.support.gateway import GatewayThread, generate, give_adapter
from tests.support.store_parts import StoreParts

LIVELY = {"learning_rate": 0.02}  # learns something in a few steps


@pytest.fixture(scope="module")
def kai(gateway: GatewayThread, trainer: AdapterTrainer, tiny_bank_folder: Path, valkey: ValkeyProcess) -> str:
    """A user whose adapter was trained with strength 0; no test changes them."""
    with gateway.client() as client:
        put(client, "kai-who-adapted", [{"text": world(0)}])
        adapt(client, "kai-who-adapted", config=LIVELY | {"strength": 0}).raise_for_status()
    working(valkey.url, trainer, tiny_bank_folder)()
    return "kai-who-adapted"


@pytest.fixture
def adapted(client: Client, ada: str, fake_engine: FakeEngine, work: Work) -> str:
    """Ada, with an adapter that the engine serves."""
    fake_engine.knobs.user_adapters = True
    adapt(client, ada, config=LIVELY).raise_for_status()
    work()
    return ada


def test_a_trained_adapter_is_served(client: Client, ada: str, fake_engine: FakeEngine, work: Work) -> None:
    fake_engine.knobs.user_adapters = True
    response = adapt(client, ada, config=LIVELY)
    job = response.json()
    assert (response.status_code, response.headers["Location"]) == (202, f"/jobs/{job['id']}")
    assert (job["state"], job["config"]["learning_rate"]) == ("queued", 0.02)
    assert who(generate(client, ada))["level"] == "merged"
    work()
    done = job_of(client, job)
    assert (done["state"], done["tries"], done["error"]) == ("succeeded", 1, None)
    assert done["held_out"]["after"] < done["held_out"]["before"]
    progress = done["progress"]
    assert progress["step"] == progress["steps"] > 0
    assert [step for step, _ in progress["loss"]] == list(range(1, progress["steps"] + 1))
    assert progress["phase"] == "all samples"
    (fold, begin), *_, (last, phase) = progress["runs"]
    assert (fold, begin, phase) == (0, "fold 1 of 2", "all samples") and 0 < last < progress["step"]
    shown = done["shown"]
    assert {"input": shown["input"], "output": shown["wanted"]} in SAMPLES
    assert shown["before"] != shown["after"]
    first, second = (loss for step, loss in progress["held_out"] if step in (0, 2))
    assert (len(progress["held_out"]) > 4, first == second) == (True, False)
    stacked, merged = who(generate(client, ada)), who(generate(client, ada, personalize="merged"))
    assert (stacked["level"], stacked["reason"], merged["level"]) == ("stacked", None, "merged")
    assert fake_engine.seen[-2].body["model"].endswith(f".{done['adapter']}")
    shares = [sum(anchor["weight"] for anchor in told["anchors"]) for told in (stacked, merged)]
    assert shares[0] == pytest.approx(shares[1], abs=0.001)
    adapter = client.get(f"/users/{ada}").json()["adapter"]
    assert (adapter["id"], adapter["stale"], adapter["recipe"]) == (done["adapter"], False, stacked["recipe"])
    assert adapter["bytes"] > 100


def test_samples_of_another_task_are_told_so_at_once(
    client: Client, gateway: GatewayThread, ada: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert adapt(client, ada).json()["hint"] is None
    monkeypatch.setattr(gateway.parts.bank, "task", news := get_task("news_headline"))
    fitting = {"input": f"{news.instruction}Rain fell.", "output": "Rain"}
    hint = adapt(client, ada, samples=[*SAMPLES, fitting]).json()["hint"]
    assert hint.startswith(f"{len(SAMPLES)} of {len(SAMPLES) + 1} samples") and "news_headline" in hint


def test_without_a_common_row_the_strength_must_be_1(gateway: GatewayThread) -> None:
    lone = gateway.parts.bank.manifest.model_copy(update={"common": False})
    assert training_config(lone, {}).strength == 1
    with pytest.raises(InvalidRequest, match=r"strength 0\.5 needs a common row"):
        training_config(lone, {"strength": 0.5})


def test_profile_changes_and_failed_jobs_keep_the_adapter(
    client: Client, adapted: str, fake_engine: FakeEngine, work: Work
) -> None:
    generate(client, adapted).raise_for_status()
    before, adapter = fake_engine.seen[-1].body["model"], client.get(f"/users/{adapted}").json()["adapter"]
    put(client, adapted, [{"text": world(4)}])
    assert (who(generate(client, adapted))["level"], fake_engine.seen[-1].body["model"]) == ("stacked", before)
    assert who(generate(client, adapted, personalize="merged"))["recipe"] not in before
    almost = [{"input": f"question {n}", "output": "y" * 500} for n in range(3)]  # too long with the chat template
    job = adapt(client, adapted, samples=almost).json()
    work()
    failed = job_of(client, job)
    assert (failed["state"], failed["adapter"]) == ("failed", None)
    assert "samples.0 has" in failed["error"]
    assert client.get(f"/users/{adapted}").json()["adapter"] == adapter


def test_responses_never_name_the_stacked_adapter(client: Client, kai: str, fake_engine: FakeEngine) -> None:
    merged = who(generate(client, kai))
    assert (merged["level"], merged["reason"]) == ("merged", "the engine cannot serve this user's adapter")
    assert ":u-" not in merged["recipe"]
    fake_engine.knobs.user_adapters = True
    told = [generate(client, kai, stream=stream) for stream in (False, True)] + [client.get(f"/users/{kai}")]
    assert ":u-" in fake_engine.seen[-1].body["model"]
    assert (who(told[0])["level"], who(told[0])["anchors"]) == ("stacked", [])
    for status in (400, 418, 500):
        fake_engine.knobs.status = status
        told.append(generate(client, kai))
    fake_engine.knobs.status, fake_engine.knobs.fail_after = None, 0
    told.append(generate(client, kai, stream=True))
    fake_engine.knobs.fail_after = 2
    told.append(generate(client, kai, stream=True))
    assert [answer.status_code for answer in told] == [200, 200, 200, 400, 502, 503, 503, 200]
    assert [("mta3:" in answer.text, ":u-" in answer.text) for answer in told] == [(True, False)] * len(told)


def test_a_user_without_a_profile_gets_one_from_the_samples(client: Client, new_user: NewUser) -> None:
    user_id = new_user()
    job = adapt(client, user_id).raise_for_status().json()
    assert client.get(f"/users/{user_id}").json()["items"] == len(SAMPLES)
    assert client.delete(f"/jobs/{job['id']}").json()["state"] == "cancelled"
    again = client.delete(f"/jobs/{job['id']}")
    assert (again.status_code, again.json()["error"]["code"]) == (409, "job_ended")


def test_texts_alone_are_samples(client: Client, new_user: NewUser) -> None:
    user_id, long = new_user(), "I went to the sea this morning, as ever. " + "The waves were high. " * 20
    adapt(client, user_id, samples=[{"text": "No sea, no me."}, {"output": long}]).raise_for_status()
    stored = client.get(f"/users/{user_id}/export").json()["samples"]
    assert [(one["messages"][-1]["content"], one["output"]) for one in stored] == [
        ("Write a text.", "No sea, no me."),
        (f"Write the next sentences of the text that begins: {long[:61].strip()}", long[61:].strip()),
    ]


@pytest.mark.parametrize(
    ("sample", "told"),
    [
        ({"text": "Yes."}, "'Yes.' is too short to learn from"),
        *((given, "must have input and output, or text alone") for given in ({}, {"input": "q"})),
        ({"output": "an answer", "text": "a text as well"}, "must have input and output, or text alone"),
        ({"input": "q", "output": "a", "text": "a text as well"}, "must have input and output, or text alone"),
    ],
)
def test_a_sample_that_teaches_nothing_is_refused(
    client: Client, new_user: NewUser, sample: dict[str, str], told: str
) -> None:
    answer = adapt(client, new_user(), samples=[*SAMPLES, sample])
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, f"samples.{len(SAMPLES)}")
    assert told in error["message"]


def test_erasing_a_user_deletes_everything_and_the_running_job(
    client: Client, adapted: str, work: Work, valkey: ValkeyProcess, *, gateway: GatewayThread, fake_engine: FakeEngine
) -> None:
    erased = {}
    job = adapt(client, adapted).json()
    work(lambda: erased.update(client.delete(f"/users/{adapted}").json()["erased"]))
    assert erased.items() >= {"items": 3, "samples": len(SAMPLES), "jobs": 2, "adapters": 1}.items()
    assert client.get(f"/jobs/{job['id']}").status_code == 404
    key = gateway.key(adapted)
    with redis.Redis.from_url(valkey.url) as raw:
        assert [name for name in raw.scan_iter() if key.encode() in name] == [f"mta:{{{key}}}:epoch".encode()]
    wait_until(lambda: fake_engine.dropped == [key], "the engine to be told")
    assert who(generate(client, adapted))["level"] == "base"


def test_a_new_bank_merges_until_it_readapts(client: Client, adapted: str, work: Work, gateway: GatewayThread) -> None:
    async def readapt() -> ReadaptTally:
        async with StoreParts.opened(gateway.opened.settings.redis_url) as parts:
            stores, manifest = (parts.jobs, parts.adapters, parts.profiles), gateway.parts.bank.manifest
            return await Readapting(*stores, manifest, 1000, JobBudget(1000, 60)).run()

    asyncio.run(give_adapter(gateway, adapted, bank="00000000"))  # as if it had been trained on an earlier bank
    assert who(generate(client, adapted))["level"] == "merged"
    assert client.get(f"/users/{adapted}").json()["adapter"]["stale"]
    tally = asyncio.run(readapt())
    assert (tally.queued, tally.waiting) == (1, 0)
    work()
    assert who(generate(client, adapted))["level"] == "stacked"


def test_while_a_job_trains_its_events_carry_its_curves(
    client: Client, gateway: GatewayThread, ada: str, work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.worker.lease.RENEW_S", 0.02)
    monkeypatch.setattr("server.gateway.routes.jobs._POLL_S", 0.02)
    job, lines = adapt(client, ada).json(), list[str]()

    def follow() -> None:
        with gateway.client() as mine, mine.stream("GET", f"/jobs/{job['id']}/events") as events:
            lines.extend(line for line in events.iter_lines() if line)

    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(follow)
        wait_until(lambda: lines, "the first event")
        work(lambda: wait_until(lambda: job_of(client, job)["progress"]["held_out"], "the first look to be stored"))
        following.result(30)
    assert (lines[0], lines[-2:]) == ("event: job", ["event: done", "data: [DONE]"])
    told: list[dict[str, Any]] = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    states = [state["state"] for state in told]
    assert (states[0], states[-1]) == ("queued", job_of(client, job)["state"])
    lengths = [len(state["progress"]["loss"]) for state in told]
    assert lengths == sorted(lengths)
    assert any(state["state"] == "running" and state["progress"]["held_out"] for state in told)
    assert told[-1] == job_of(client, job)


def test_an_export_without_samples(client: Client, ada: str, new_user: NewUser, gateway: GatewayThread) -> None:
    answer = client.get(f"/users/{ada}/export").raise_for_status()
    assert answer.headers["Cache-Control"] == "no-store"
    export = answer.json()
    assert (export["user_id"], export["adapter"], export["samples"], export["jobs"]) == (ada, None, [], [])
    assert [item["text"] for item in export["items"]] == [world(0), f"{world(0)} again", world(2)]
    embedder = gateway.parts.bank.manifest.embedder
    assert (export["embedder"], len(export["embedding"])) == (embedder.id, embedder.dim)
    assert np.linalg.norm(export["embedding"]) == pytest.approx(1, abs=1e-3)
    vectors = [np.frombuffer(base64.b64decode(v["fp16"]), "<f2") for v in export["vectors"].values()]
    assert {vector.shape for vector in vectors} == {(embedder.dim,)}
    assert list(export["vectors"]) == [item["id"] for item in export["items"]]
    again = put(client, ada, export["items"])
    assert (again["kept"], again["changed"]) == (3, 0)
    client.delete(f"/users/{ada}").raise_for_status()
    for nobody in (ada, new_user()):
        assert error_of(client.get(f"/users/{nobody}/export")) == (404, "user_id", "not_found")


def test_exports_are_made_a_few_at_a_time(
    client: Client, ada: str, gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most = 0, 0

    async def slow(*_: object) -> Iterator[bytes]:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.05)

        def pieces() -> Iterator[bytes]:
            nonlocal now
            time.sleep(0.05)
            yield b"{}"
            now -= 1

        return pieces()

    monkeypatch.setattr(gateway.parts.exporting, "export", slow)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: client.get(f"/users/{ada}/export"), range(8)))
    assert [answer.json() for answer in answers] == [{}] * 8
    assert (now, most) == (0, EXPORTS_AT_ONCE // 2)


def test_an_export_has_the_whole_adapter_in_peft_format(
    client: Client, gateway: GatewayThread, ada: str, work: Work, tmp_path: Path
) -> None:
    job = adapt(client, ada, config={"learning_rate": 0.02}, idempotency_key="once").raise_for_status().json()
    work()
    export = client.get(f"/users/{ada}/export").raise_for_status().json()
    assert [sample["output"] for sample in export["samples"]] == [sample["output"] for sample in SAMPLES]
    assert export["jobs"] == [job_of(client, job) | {"idempotency_key": "once", "traceparent": None}]
    adapter, noted = export["adapter"], client.get(f"/users/{ada}").json()["adapter"]
    assert (adapter["id"], adapter["recipe"], adapter["bytes"]) == (noted["id"], noted["recipe"], noted["bytes"])
    assert len(base64.b64decode(adapter["stored"])) == noted["bytes"]
    out = tmp_path / "ada"
    done = CliRunner().invoke(app, ["users", "export", ada, "--url", gateway.url, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "whole adapter" in done.output
    assert read_peft(out / "adapter").rank == 4 + 2
    assert sorted(path.name for path in out.iterdir()) == ["adapter", "user.json"]
    del adapter["peft"]
    adapter["folder"] = "adapter"
    assert json.loads((out / "user.json").read_text()) == export


async def test_the_rest_of_the_record_and_a_lost_adapter(client: Client, ada: str, gateway: GatewayThread) -> None:
    async with StoreParts.opened(gateway.opened.settings.redis_url) as parts:
        snapshot = await parts.profiles.read(gateway.key(ada))
        made_of = snapshot.profile.updated_ms
        signed = StoredSignature(Signature("9f2c41d0", 7, np.array([0.5, -0.25], "f4")), made_of)
        other = OtherEmbedding("00" * 8, np.full(4, 0.5, "f4"), made_of)
        repeated, later = phrase_table([[7, 8]] * 2).tobytes(), {200: b"later"}
        profile = replace(snapshot.profile, signature=signed, other=other, phrases=repeated, extra=later)
        assert await parts.profiles.commit(gateway.key(ada), snapshot.version, Change(profile, {}, {}, ()))
    await give_adapter(gateway, ada)
    export = client.get(f"/users/{ada}/export").raise_for_status().json()
    assert export["signature"].pop("products") == pytest.approx([0.5, -0.25], abs=1e-3)
    assert export["signature"] == {"bank": "9f2c41d0", "tokens": 7, "made_of_ms": made_of}
    assert export["other_embedding"] == {"embedder": "00" * 8, "embedding": [0.5] * 4, "made_of_ms": made_of}
    assert base64.b64decode(export["phrases"]) == repeated
    assert export["of_later_versions"] == {"200": "bGF0ZXI="}
    adapter = export["adapter"]
    assert (adapter["peft"], adapter["stored"], adapter["says"]) == (None, None, "it is no longer stored")


@ALL
def test_strength_is_a_factor_on_the_banks_own_weights(client: Client, ada: str, route: str) -> None:
    full, half, none = (who(either(client, route, user=ada, strength=strength)) for strength in (1, 0.5, 0))
    assert full["recipe"] == who(either(client, route, user=ada))["recipe"]
    sums = [sum(term.weight for term in parse_recipe(found["recipe"]).terms) for found in (full, half)]
    assert sums[1] == round(sums[0] / 2)
    assert half["reason"] is None  # there is no adapter that it could not be served with
    assert (none["recipe"].rpartition(":")[2], none["anchors"], none["level"]) == ("c", [], "merged")
    assert [anchor["id"] for anchor in half["anchors"]] == [anchor["id"] for anchor in full["anchors"]]


@ALL
def test_with_a_strength_below_1_a_stacked_user_is_merged(
    client: Client, ada: str, gateway: GatewayThread, fake_engine: FakeEngine, route: str
) -> None:
    fake_engine.knobs.user_adapters = True
    asyncio.run(give_adapter(gateway, ada))
    assert who(either(client, route, user=ada, strength=1))["level"] == "stacked"
    below = who(either(client, route, user=ada, strength=0.95))
    reason = "strength is below 1, and the user's adapter is served on its own recipe only"
    assert (below["level"], below["reason"]) == ("merged", reason)
    assert ":u-" not in fake_engine.seen[-1].body["model"]


@ALL
@pytest.mark.usefixtures("fake_engine")
def test_without_a_common_row_only_a_strength_of_1_is_taken(
    client: Client, gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch, route: str
) -> None:
    bank = gateway.parts.bank
    monkeypatch.setattr(bank, "manifest", bank.manifest.model_copy(update={"common": False}))
    assert error_of(either(client, route, strength=0.5))[:2] == (400, "strength")
    assert either(client, route, strength=1).status_code == 200
