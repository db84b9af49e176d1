"""`GET /users/{id}/export`: everything that is stored of a person, and nothing of anybody else."""

from __future__ import annotations

import base64
from collections.abc import Callable

import httpx
import numpy as np
import pytest

from bench.rig.tiny import world
from tests.integration.conftest import Work
from tests.support.adapting import SAMPLES, adapt, job_of
from tests.support.gateway import GatewayThread, give_adapter

NewUser = Callable[[], str]


def test_a_person_without_samples_has_a_record_and_items(
    client: httpx.Client, ada: str, gateway: GatewayThread
) -> None:
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


def test_the_items_of_an_export_make_the_same_profile_again(client: httpx.Client, ada: str, new_user: NewUser) -> None:
    items = client.get(f"/users/{ada}/export").json()["items"]
    again = client.put(f"/users/{ada}/profile", json={"items": items}).raise_for_status().json()
    assert (again["kept"], again["changed"]) == (3, 0)


def test_an_adapted_person_has_samples_jobs_and_the_whole_adapter(client: httpx.Client, ada: str, work: Work) -> None:
    job = adapt(client, ada, config={"learning_rate": 0.02}, idempotency_key="once").raise_for_status().json()
    work()
    export = client.get(f"/users/{ada}/export").raise_for_status().json()
    assert [sample["output"] for sample in export["samples"]] == [sample["output"] for sample in SAMPLES]
    assert export["jobs"] == [job_of(client, job) | {"idempotency_key": "once", "traceparent": None}]
    adapter = export["adapter"]
    noted = client.get(f"/users/{ada}").json()["adapter"]
    assert (adapter["id"], adapter["recipe"], adapter["bytes"]) == (noted["id"], noted["recipe"], noted["bytes"])
    assert len(base64.b64decode(adapter["stored"])) == noted["bytes"]
    config, raw = adapter["peft"]["config"], base64.b64decode(adapter["peft"]["weights"], validate=True)
    start = 8 + int.from_bytes(raw[:8], "little")
    assert config["r"] == 4 + 2
    modules = len(config["target_modules"])
    assert raw[:start].count(b"lora_A") == raw[:start].count(b"lora_B") == modules > 0
    assert "whole adapter" in adapter["says"]


async def test_an_adapter_that_cannot_be_made_whole_is_explained(
    client: httpx.Client, ada: str, gateway: GatewayThread
) -> None:
    await give_adapter(gateway, ada)
    adapter = client.get(f"/users/{ada}/export").raise_for_status().json()["adapter"]
    assert (adapter["peft"], adapter["stored"], adapter["says"]) == (None, None, "it is no longer stored")


def test_nobody_has_no_export(client: httpx.Client, ada: str, new_user: NewUser) -> None:
    assert client.get(f"/users/{new_user()}/export").status_code == 404
    client.delete(f"/users/{ada}").raise_for_status()
    assert client.get(f"/users/{ada}/export").json()["error"]["code"] == "not_found"
