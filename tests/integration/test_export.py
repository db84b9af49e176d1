"""`GET /users/{id}/export`: everything that is stored about a user, and nothing about anybody else."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from httpx import Client
from typer.testing import CliRunner

from bank.lookup.signature import Signature
from bank.peft.imported import read_peft
from bench.rig.tiny import world
from server.cli import app
from server.store.profile_record import OtherEmbedding, StoredSignature
from server.store.profiles import Change
from tests.integration.conftest import Work
from tests.support.calls import SAMPLES, NewUser, adapt, error_of, job_of, put
from tests.support.gateway import GatewayThread, give_adapter
from tests.support.stored import opened


def test_without_samples_the_export_has_record_and_items(
    client: Client, ada: str, new_user: NewUser, gateway: GatewayThread
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
    again = put(client, ada, export["items"])
    assert (again["kept"], again["changed"]) == (3, 0)
    client.delete(f"/users/{ada}").raise_for_status()
    for nobody in (ada, new_user()):
        assert error_of(client.get(f"/users/{nobody}/export")) == (404, "user_id", "not_found")


def test_with_samples_it_has_jobs_and_the_whole_adapter_which_the_command_writes_as_peft_does(
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
    async with opened(gateway.parts.settings.redis_url) as store:
        snapshot = await store.read(gateway.key(ada))
        made_of = snapshot.profile.updated_ms
        signed = StoredSignature(Signature("9f2c41d0", 7, np.array([0.5, -0.25], "f4")), made_of)
        other = OtherEmbedding("00" * 8, np.full(4, 0.5, "f4"), made_of)
        profile = replace(snapshot.profile, signature=signed, other=other, extra={200: b"later"})
        assert await store.commit(gateway.key(ada), snapshot.version, Change(profile, {}, {}, ()))
    await give_adapter(gateway, ada)
    export = client.get(f"/users/{ada}/export").raise_for_status().json()
    assert export["signature"].pop("products") == pytest.approx([0.5, -0.25], abs=1e-3)
    assert export["signature"] == {"bank": "9f2c41d0", "tokens": 7, "made_of_ms": made_of}
    assert export["other_embedding"] == {"embedder": "00" * 8, "embedding": [0.5] * 4, "made_of_ms": made_of}
    assert export["of_later_versions"] == {"200": "bGF0ZXI="}
    adapter = export["adapter"]
    assert (adapter["peft"], adapter["stored"], adapter["says"]) == (None, None, "it is no longer stored")
