"""What the version before has written opens and serves: its bank, data folder and copy (`tests/earlier/make.py`)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from pydantic import SecretStr

from bank.manifest import read_manifest
from bank.models.folders import check_base_model
from bench.rig.up import up
from bench.rig.valkey import ValkeyProcess
from server.settings import Settings
from server.store.backup import copying
from server.worker.training import AdapterTrainer
from tests.support.calls import error_of, job_of, mta, put, who
from tests.support.fake_engine import FakeEngine, Knobs
from tests.support.gateway import GatewayThread, generate, wait_until_ready

EARLIER = Path(__file__).parents[1] / "earlier"
BANK, MODEL, MADE = EARLIER / "bank", EARLIER / "model", json.loads((EARLIER / "made.json").read_text("utf-8"))
SECRET = (EARLIER / "data/secret").read_text("ascii").strip()
KEYED = {"Authorization": f"Bearer {MADE['key']}"}


@pytest.fixture(scope="module", params=["data", "copy"])
def client(request: pytest.FixtureRequest, memory: Path, gateway_settings: Settings) -> Iterator[httpx.Client]:
    """A client of a gateway over what was stored: over its own files, or restored from the copy."""
    engine = FakeEngine(Knobs(banks=(read_manifest(BANK).fingerprint,), user_adapters=True)).start()
    folder = memory / f"earlier-{request.param}"
    if request.param == "data":
        shutil.copytree(EARLIER / "data/valkey", folder)
    with ValkeyProcess(folder) as server, pytest.MonkeyPatch.context() as patched:
        if request.param == "copy":
            patched.setattr(copying, "SETTLE_S", 0)
            mta("restore", EARLIER / "copy", "--without-erasures", MTA_REDIS_URL=server.url, MTA_SECRET=SECRET)
        changes = {"bank": BANK, "secret": SecretStr(SECRET), "redis_url": server.url, "engine_url": engine.url}
        with GatewayThread(gateway_settings, **changes) as gateway, gateway.client() as client:
            client.headers.update(KEYED)
            wait_until_ready(client)
            yield client
    engine.stop()


def test_its_keys_are_still_demanded_and_accepted(client: httpx.Client) -> None:
    refused = httpx.get(f"{client.base_url}/users/plain")
    assert error_of(refused)[0] == httpx.codes.UNAUTHORIZED
    assert client.get("/users/plain").status_code == httpx.codes.OK


def test_known_person_is_served_by_signature_with_feedback(client: httpx.Client) -> None:
    merged = who(generate(client, "plain"))
    assert (merged["level"], merged["source"]) == ("merged", "signature")
    export = client.get("/users/plain/export").raise_for_status().json()
    assert [entry["sample"]["output"] for entry in export["feedback"]] == ["The sea, always."]
    assert len(export["items"]) == 2  # theirs, and what feedback taught


def test_an_adapter_that_it_trained_is_served_and_complete(client: httpx.Client) -> None:
    assert who(generate(client, "adapted"))["level"] == "stacked"
    assert job_of(client, {"id": MADE["job"]})["state"] == "succeeded"
    export = client.get("/users/adapted/export").raise_for_status().json()
    assert export["adapter"]["peft"]["config"]["peft_type"] == "LORA"


def test_whom_it_erased_stays_erased_until_they_are_stored_again(client: httpx.Client) -> None:
    erased = client.delete("/users/erased").raise_for_status().json()["erased"]
    assert (erased["items"], client.get("/users/erased").status_code) == (1, httpx.codes.NOT_FOUND)
    assert client.delete("/users/nobody").status_code == httpx.codes.NOT_FOUND
    for user in ("erased", "nobody"):
        put(client, user)
        assert who(generate(client, user))["level"] == "merged"


def test_a_worker_opens_its_bank_with_the_model_it_was_made_for() -> None:
    manifest = read_manifest(BANK)
    check_base_model(MODEL, {BANK: manifest})
    signature = AdapterTrainer.open(BANK, manifest, MODEL, "float32").signature([("a question", "an answer")])
    assert signature.is_usable_for(manifest.short) and np.any(signature.products)


@pytest.mark.acceptance
def test_a_real_engine_serves_its_data_folder(tmp_path: Path) -> None:
    shutil.copytree(EARLIER / "data", tmp_path / "data")
    with up(tmp_path / "data", "--bank", str(BANK), "--model", str(MODEL)) as server, server.client() as client:
        client.headers.update(KEYED)
        levels = {user: who(generate(client, user))["level"] for user in ("plain", "adapted", "erased")}
    assert levels == {"plain": "merged", "adapted": "stacked", "erased": "base"}
