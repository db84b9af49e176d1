"""People whose texts are not kept: a real gateway, worker and Valkey, in which no text stays once it has been used."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from bank.lookup.signature import Signature
from bank.manifest import read_manifest
from bench.rig.processes import wait_until
from bench.rig.tiny import tiny_bank
from bench.rig.valkey import ValkeyProcess
from server.settings import Settings
from server.store.profile_record import Profile
from server.store.profiles import Change
from server.store.queue import UserQueue
from server.store.tenants.access_keys import Policy, Scope, access_key, new_secret
from server.worker.loops import JobLoop, SigningLoop
from server.worker.training import AdapterTrainer
from tests.support.calls import adapt, give, put
from tests.support.fake_engine import FakeEngine, Knobs
from tests.support.gateway import GatewayThread, generate, wait_until_ready
from tests.support.store_parts import StoreParts

MARK = "marzipan-1f9c"
ITEMS = [{"input": f"question {n}", "output": f"{n} yes {MARK} yes"} for n in range(4)]
MORE = [{"input": f"later question {n}", "output": f"{n} no {MARK} no"} for n in range(3)]
SAMPLES = [{"input": f"sample {n}", "output": f"{n} yes {MARK}"} for n in range(8)]


@pytest.fixture(scope="module")
def bank_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, embedder_folder: Path) -> Path:
    return tiny_bank(tmp_path_factory.mktemp("bank"), tiny_model_folder, embedder_folder, anchors=6, signs=True)


@pytest.fixture(scope="module")
def trainer(bank_folder: Path, tiny_model_folder: Path) -> AdapterTrainer:
    return AdapterTrainer.open(bank_folder, read_manifest(bank_folder), tiny_model_folder, "float32")


class Rig:
    """A gateway that keeps no texts, its store, and a worker that works when it is told to."""

    def __init__(
        self, gateway: GatewayThread, client: httpx.Client, store: ValkeyProcess, trainer: AdapterTrainer
    ) -> None:
        self.gateway, self.client, self.store, self.trainer = gateway, client, store, trainer
        self.bank = gateway.parts.bank

    def work(self) -> None:
        """Sign all who wait, then train all jobs."""

        async def work() -> None:
            async with StoreParts.opened(self.store.url) as parts:
                queue, lock = UserQueue(parts.connection, "sign", self.bank.manifest.short), asyncio.Lock()
                signing = SigningLoop(queue, parts.profiles, self.bank, self.trainer, model_lock=lock)
                stores = parts.jobs, parts.profiles, parts.feedback, parts.adapters
                jobs = JobLoop(*stores, bank=self.bank, trainer=self.trainer, model_lock=lock, signing=signing)
                while await signing.work_once(0.05) or await jobs.work_once(0.05):
                    pass

        asyncio.run(work())

    def holds(self, text: str = MARK) -> set[str]:
        """The names of the keys of the store whose dumps contain a text."""

        async def look() -> set[str]:
            async with self.store.client() as raw:
                await raw.config_set("rdbcompression", "no")
                found = {key.decode(): await raw.dump(key) async for key in raw.scan_iter()}
            return {key for key, dumped in found.items() if text.encode() in key.encode() + (dumped or b"")}

        return asyncio.run(look())

    def profile(self, user_id: str) -> Profile:
        async def load() -> Profile | None:
            async with StoreParts.opened(self.store.url) as parts:
                return await parts.profiles.load(self.gateway.key(user_id))

        profile = asyncio.run(load())
        assert profile is not None
        return profile

    def signature(self, *items: dict[str, str]) -> Signature:
        return self.trainer.signature([(item["input"], item["output"]) for item in items])

    def add(self, user_id: str, items: list[dict[str, str]]) -> dict[str, Any]:
        return self.client.post(f"/users/{user_id}/profile/items", json={"items": items}).raise_for_status().json()

    def close_to(self, user_id: str, *items: dict[str, str]) -> bool:
        """Whether a user has the signature of these items, as exactly as the store keeps it."""
        stored, made = self.profile(user_id).evidence, self.signature(*items)
        assert stored is not None
        same = np.allclose(stored.products, made.products, atol=2e-3 * made.length)
        return stored.tokens == made.tokens and bool(same)


@pytest.fixture(scope="module")
def rig(gateway_settings: Settings, bank_folder: Path, trainer: AdapterTrainer, store: ValkeyProcess) -> Iterator[Rig]:
    engine = FakeEngine(Knobs(banks=(read_manifest(bank_folder).fingerprint,))).start()
    changes = {"bank": bank_folder, "engine_url": engine.url, "redis_url": store.url, "keep_texts": False}
    with GatewayThread(gateway_settings, **changes) as gateway, gateway.client() as client:
        wait_until_ready(client)
        yield Rig(gateway, client, store, trainer)
    engine.stop()


def test_no_text_stays_once_signed_and_trained_on(rig: Rig, new_user: Callable[[], str]) -> None:
    user_id = new_user()
    put(rig.client, user_id, ITEMS)
    assert {name.rpartition(":")[2] for name in rig.holds()} == {"items"}
    answer = generate(rig.client, user_id, prompt=f"what of {MARK}? I ask you in my own words", learn=True).json()
    wait_until(lambda: rig.client.get(f"/users/{user_id}").json()["items"] > len(ITEMS), "the message to be learnt")
    final = {"input": f"any {MARK}?", "text": "None.", "final": f"Much {MARK}, always."}
    assert give(rig.client, user_id, answer["id"], **final).raise_for_status().json()["learned"]
    job = adapt(rig.client, user_id, samples=SAMPLES).raise_for_status().json()
    assert {name.rpartition(":")[2] for name in rig.holds()} == {"items", "samples"}
    rig.work()
    done = rig.client.get(f"/jobs/{job['id']}").json()
    assert (done["state"] in {"succeeded", "rejected"}, done["shown"]) == (True, None)
    assert rig.holds() == set()
    assert MARK not in rig.client.get(f"/users/{user_id}/export").text
    who = generate(rig.client, user_id, history=2, personalize="merged").json()["personalization"]
    assert (who["source"], who["history"]) == ("signature", 0)
    assert "not kept" in who["history_reason"]
    listed = rig.client.get(f"/users/{user_id}/profile/items").json()
    assert (listed["items"], bool(listed["hint"])) == ([], True)


def test_items_add_to_the_evidence_and_repeats_do_not(rig: Rig, new_user: Callable[[], str]) -> None:
    user_id = new_user()
    put(rig.client, user_id, ITEMS)
    rig.work()
    assert rig.close_to(user_id, *ITEMS)
    for _ in range(2):
        rig.add(user_id, [*ITEMS[2:], *MORE])
        rig.work()
        assert rig.close_to(user_id, *ITEMS, *MORE)
    texts = [f"{item['input']}\n{item['output']}" for item in (*ITEMS, *MORE)]
    mean = rig.gateway.parts.profiles.embedder.embed(texts).mean(axis=0)
    profile = rig.profile(user_id)
    assert profile.items == len(texts)
    assert float(profile.embedding @ mean / np.linalg.norm(mean)) == pytest.approx(1, abs=1e-3)


def test_a_put_of_other_items_starts_anew(rig: Rig, new_user: Callable[[], str]) -> None:
    user_id = new_user()
    put(rig.client, user_id, ITEMS)
    rig.work()
    assert put(rig.client, user_id, ITEMS)["changed"] == 0
    assert rig.profile(user_id).is_signed(rig.bank.manifest.short)
    told = put(rig.client, user_id, MORE)
    assert (told["kept"], told["changed"], told["removed"]) == (3, 3, 4)
    assert generate(rig.client, user_id).json()["personalization"]["source"] == "topic"
    rig.work()
    assert rig.close_to(user_id, *MORE)


def test_the_same_id_with_other_content_adds_to_the_evidence(rig: Rig, new_user: Callable[[], str]) -> None:
    user_id = new_user()
    put(rig.client, user_id, [{"id": "n1", **ITEMS[0]}])
    rig.work()
    assert rig.add(user_id, [{"id": "n1", **MORE[0]}])["changed"] == 1
    rig.work()
    assert rig.close_to(user_id, ITEMS[0], MORE[0])


def test_another_bank_forgets_until_texts_come_again(rig: Rig, new_user: Callable[[], str]) -> None:
    user_id = new_user()
    put(rig.client, user_id, ITEMS)
    rig.work()
    short, key = rig.bank.manifest.short, rig.gateway.key(user_id)
    stored = rig.profile(user_id).signature
    assert stored is not None
    old = replace(stored, signature=replace(stored.signature, bank="00" * 4))

    async def change(**changes: Any) -> None:
        async with StoreParts.opened(rig.store.url) as parts:
            snapshot = await parts.profiles.read(key)
            assert snapshot.profile
            changed = Change(replace(snapshot.profile, **changes), {}, {}, ())
            assert await parts.profiles.commit(key, snapshot.version, changed, snapshot.epoch)

    for changes, level in (({"signature": old}, "merged"), ({"signature": old, "embedder": "00" * 8}, "common")):
        asyncio.run(change(**changes))
        who = generate(rig.client, user_id).json()["personalization"]
        assert (who["level"], "send texts again" in who["reason"]) == (level, True)
        assert "send texts again" in rig.client.get(f"/users/{user_id}").json()["reason"]
        rig.work()
        assert not rig.profile(user_id).is_signed(short)
        assert rig.add(user_id, ITEMS)["changed"] == len(ITEMS)  # though they counted before
        rig.work()
        assert rig.close_to(user_id, *ITEMS)
        assert rig.client.get(f"/users/{user_id}").json()["reason"] is None
    asyncio.run(change(signature=old))
    adapt(rig.client, user_id, samples=SAMPLES).raise_for_status()  # samples are texts too
    rig.work()
    assert rig.close_to(user_id, *SAMPLES)


def test_a_bank_without_signatures_stores_no_text(
    gateway_settings: Settings, store: ValkeyProcess, trainer: AdapterTrainer, new_user: Callable[[], str]
) -> None:
    with GatewayThread(gateway_settings, redis_url=store.url, keep_texts=False) as gateway, gateway.client() as client:
        rig, user_id = Rig(gateway, client, store, trainer), new_user()
        put(client, user_id, ITEMS)
        for changed in (len(MORE), 0):
            told = rig.add(user_id, [*ITEMS, *MORE])
            assert (told["changed"], told["kept"]) == (changed, len(ITEMS) + len(MORE))
            assert rig.holds() == set()
        before = rig.profile(user_id).embedding
        put(client, user_id, MORE)
        assert not np.array_equal(rig.profile(user_id).embedding, before)
        assert rig.profile(user_id).items == len(MORE)


def test_a_key_keeps_texts_or_drops_what_another_kept(rig: Rig, new_user: Callable[[], str]) -> None:
    """The last test here: from now on the gateway wants keys."""
    user_id, tenant = new_user(), rig.gateway.opened.settings.tenant
    secrets = {keep: new_secret() for keep in (True, False, None)}

    async def add_keys() -> None:
        async with StoreParts.opened(rig.store.url) as parts:
            for keep, secret in secrets.items():
                await parts.keys.add(access_key(secret, f"keep {keep}", tenant, Scope, Policy(keep_texts=keep)))

    asyncio.run(add_keys())

    def all_count() -> bool:
        given: list[dict[str, str]] = [{}, *({"Authorization": f"Bearer {secret}"} for secret in secrets.values())]
        return [rig.client.get("/v1/models", headers=one).status_code for one in given] == [401, 200, 200, 200]

    wait_until(all_count, "all keys to count")

    def keeps_after(keep: bool | None, method: str, path: str, number: int, removed: int = 0) -> bool:
        headers = {"Authorization": f"Bearer {secrets[keep]}"}
        items = [{"id": str(n), **item} for n, item in enumerate(ITEMS[:number])]
        asked = rig.client.request(method, f"/users/{user_id}/{path}", json={"items": items}, headers=headers)
        assert asked.raise_for_status().json()["removed"] == removed
        rig.work()
        stays = rig.profile(user_id).keeps_texts
        assert bool(rig.holds()) == stays
        return stays

    assert keeps_after(True, "PUT", "profile", 2)
    assert not keeps_after(None, "POST", "profile/items", 2)  # nothing new, but to be forgotten
    assert rig.close_to(user_id, *ITEMS[:2])
    assert not keeps_after(True, "POST", "profile/items", 4)
    assert rig.close_to(user_id, *ITEMS)
    assert keeps_after(True, "PUT", "profile", 3, removed=1)
    assert rig.close_to(user_id, *ITEMS[:3])
    assert not keeps_after(False, "PUT", "profile", 2, removed=1)
    assert rig.close_to(user_id, *ITEMS[:2])
