"""Signatures, from a profile that changes to the answer that follows them: a real gateway, Valkey and worker loop."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from bank.items.profile import Item
from bank.items.prompt import answer_ids
from bank.lookup.phrases import decode_phrases, proposals
from bank.lookup.serving import ServingBank
from bank.lookup.signature import Signature
from bank.manifest import read_manifest
from bench.rig.tiny import tiny_bank, world
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.gateway.generation.personalizer import Personalizer
from server.gateway.generation.request import Personalize
from server.settings import Settings
from server.store.profile_record import Profile, StoredSignature
from server.store.profiles import ProfileStore
from server.store.queue import UserQueue
from server.store.tenants.user_key import UserKeys
from server.worker.lease import Stalled
from server.worker.loops import MAX_SIGN_TRIES, SigningLoop
from server.worker.training import AdapterTrainer
from tests.support.calls import SAMPLES, pair
from tests.support.fake_engine import FakeEngine, Knobs
from tests.support.gateway import generate, serving
from tests.support.store_parts import connected

QUERY = np.eye(1, 384, dtype="f4")[0]
ODD = {"input": "odd", "output": "one"}
ODD_TEXTS = {  # and what is known of people who wrote nothing else
    "one word": ("Yes", "topic"),
    "no end": ("x" * 60_000, "signature"),
    "emoji": ("🌹🐝 " * 150, "signature"),
    "right to left": ("שלום לכולם, היום ירד גשם. " * 20, "signature"),
    "code": ("def f(x):\n    return {'a': [x, None]}  # %s <|im_end|>\n" * 12, "signature"),
    "only quotes": ("> You wrote that it rains.\n" * 20, "signature"),
    "mostly spaces": ("a" + " \u00a0\n\t" * 200 + "b", "topic"),
}
PICKY = "{% if messages[0]['content'] == 'odd' %}{{ raise_exception('odd') }}{% endif %}"


class Sign:
    """Makes all signatures that are wanted now, and counts them; `meanwhile` happens while the first is made."""

    def __init__(self, url: str, bank: ServingBank, trainer: AdapterTrainer) -> None:
        self._url, self._bank, self.trainer = url, bank, trainer

    def __call__(self, meanwhile: Callable[[], object] = lambda: None) -> int:
        self.made, self._meanwhile = 0, meanwhile
        asyncio.run(self._all())
        return self.made

    def signature(self, pairs: Sequence[tuple[str, str]]) -> Signature:
        self.made += 1
        if self.made == 1:
            self._meanwhile()
        return self.trainer.signature(pairs)

    def phrases(self, items: Sequence[Item]) -> bytes:
        return self.trainer.phrases(items)

    async def _all(self) -> None:
        async with connected(self._url) as connection:
            queue, profiles = UserQueue(connection, "sign", self._bank.manifest.short), ProfileStore(connection)
            loop = SigningLoop(queue, profiles, self._bank, self, model_lock=asyncio.Lock())
            while await loop.work_once(0.05):
                pass


@pytest.fixture(scope="module")
def signed_bank(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, embedder_folder: Path) -> Path:
    return tiny_bank(tmp_path_factory.mktemp("bank"), tiny_model_folder, embedder_folder, anchors=6, signs=True)


@pytest.fixture(scope="module")
def sign(signed_bank: Path, tiny_model_folder: Path, valkey: ValkeyProcess) -> Sign:
    trainer = AdapterTrainer.open(signed_bank, read_manifest(signed_bank), tiny_model_folder, "float32")
    return Sign(valkey.url, ServingBank.open(signed_bank, trainer.manifest.embedder.id), trainer)


@pytest.fixture(scope="module")
def signing_client(gateway_settings: Settings, signed_bank: Path) -> Iterator[httpx.Client]:
    """Of a gateway over the signed bank, and an engine of its own that says it serves it."""
    engine = FakeEngine(Knobs(banks=(read_manifest(signed_bank).fingerprint,))).start()
    with serving(gateway_settings, bank=signed_bank, engine_url=engine.url) as client:
        yield client
    engine.stop()


@pytest.fixture
def client(signing_client: httpx.Client, sign: Sign) -> httpx.Client:
    """The client, with nobody waiting for a signature."""
    sign()
    return signing_client


def put(client: httpx.Client, user_id: str, items: Sequence[object]) -> None:
    client.put(f"/users/{user_id}/profile", json={"items": items}).raise_for_status()


def source(client: httpx.Client, user_id: str) -> Any:
    return generate(client, user_id).json()["personalization"]["source"]


@pytest.fixture
def user_id(client: httpx.Client, new_user: Callable[[], str]) -> str:
    put(client, user_id := new_user(), SAMPLES)
    return user_id


def test_topics_speak_until_the_signature_is_there(client: httpx.Client, user_id: str, sign: Sign) -> None:
    put(client, user_id, SAMPLES[:3])  # changes that nobody has seen yet are one signature
    put(client, user_id, SAMPLES)
    assert source(client, user_id) == "topic"
    assert sign() == 1
    who = generate(client, user_id).json()["personalization"]
    assert who["source"] == client.get(f"/users/{user_id}").json()["source"] == "signature"
    weights = [abs(anchor["weight"]) for anchor in who["anchors"]]
    assert weights == sorted(weights, reverse=True)
    assert all(anchor["gain"] for anchor in who["anchors"])


def test_a_signature_speaks_for_whom_no_topic_is_known_yet(sign: Sign) -> None:
    bank, user = sign._bank, UserKeys("a secret for tests only", "signing").user("ada")
    found = StoredSignature(Signature(bank.manifest.short, 9, np.ones(6, "f4")), 1)
    of_another = Profile("ada", 1, 1, "00" * 8, np.ones(4, "f4") / 2, signature=found)  # embedder, with fewer numbers
    embedder = SimpleNamespace(id=bank.manifest.embedder.id, dim=bank.manifest.embedder.dim)
    profiles = SimpleNamespace(embedder=embedder, is_forgotten=lambda profile: False)
    request = SimpleNamespace(
        user=user, personalize=Personalize.MERGED, strength=1.0, words=False, holdout=0.0, sampling={}
    )
    (merged,) = Personalizer(bank, profiles).candidates(request, user, of_another)  # type: ignore[arg-type]
    assert (merged.source, merged.recipe) == ("signature", bank.personalise(0 * QUERY, found.signature).recipe)


def test_a_change_or_an_erasure_while_signing_counts(client: httpx.Client, user_id: str, sign: Sign) -> None:
    assert sign(lambda: put(client, user_id, SAMPLES[:4])) == 2
    assert sign() == 0
    put(client, user_id, SAMPLES)
    sign(lambda: client.delete(f"/users/{user_id}").raise_for_status())
    assert client.get(f"/users/{user_id}").status_code == httpx.codes.NOT_FOUND


@pytest.mark.parametrize("trouble", ["short texts", "a gradient that is no number", "refused by the template"])
def test_unlearnable_items_use_topics_and_are_not_signed_again(
    client: httpx.Client, user_id: str, sign: Sign, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    numbers, tokenizer = sign.trainer.manifest.layout.b_numbers, sign.trainer.tokenizer
    items = [{"text": world(0)}, {"text": world(1)}] if trouble == "short texts" else [*SAMPLES, ODD]
    if "gradient" in trouble:
        monkeypatch.setattr("bank.building.signer.b_gradient", lambda *_: torch.full((numbers,), torch.nan))
    elif "template" in trouble:
        monkeypatch.setattr(tokenizer, "chat_template", PICKY + tokenizer.chat_template)
    put(client, user_id, items)
    assert generate(client, user_id).json()["personalization"]["reason"] is None  # not known yet
    assert (sign(), source(client, user_id)) == (1, "topic")
    reason = generate(client, user_id).json()["personalization"]["reason"]
    assert reason == "none of the user's items can be learnt from, so their topics decide"
    assert sign() == 0
    monkeypatch.undo()
    put(client, user_id, SAMPLES[:4])
    sign()
    assert source(client, user_id) == "signature"


def test_plain_texts_are_signed(client: httpx.Client, user_id: str, sign: Sign) -> None:
    put(client, user_id, [{"text": "Yes."}, {"text": f"{world(1)}: no. " * 40}])
    assert (sign(), source(client, user_id)) == (1, "signature")


@pytest.mark.parametrize(("text", "known"), ODD_TEXTS.values(), ids=ODD_TEXTS)
def test_odd_texts_are_signed(client: httpx.Client, user_id: str, sign: Sign, text: str, known: str) -> None:
    put(client, user_id, [{"text": text}])
    assert (sign(), source(client, user_id)) == (1, known)


def test_signature_that_kills_workers_is_given_up_at_last_try(
    client: httpx.Client, user_id: str, sign: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.store.queue.GRACE_MS", 0)  # what a worker that died had taken is due at once

    def no_memory() -> None:
        raise MemoryError

    for _ in range(MAX_SIGN_TRIES):
        with pytest.raises(MemoryError):
            sign(no_memory)
    assert (sign(no_memory), source(client, user_id)) == (0, "topic")
    put(client, user_id, SAMPLES[:4])
    sign()
    assert source(client, user_id) == "signature"


def test_a_store_that_is_away_is_no_try(
    client: httpx.Client, user_id: str, sign: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.worker.lease.RENEW_S", 0.01)
    commit, failures = ProfileStore.commit, 0

    async def away(*args: Any) -> bool:
        nonlocal failures
        failures += 1
        if failures <= MAX_SIGN_TRIES:
            raise Unavailable("the store cannot be used now")
        return await commit(*args)

    monkeypatch.setattr(ProfileStore, "commit", away)
    assert (sign(), failures) == (1, MAX_SIGN_TRIES + 1)
    assert source(client, user_id) == "signature"


def test_a_signing_that_stalls_ends_the_process(user_id: str, sign: Sign, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.worker.lease.STALL_S", 0.1)
    with pytest.raises(Stalled):
        sign(lambda: time.sleep(0.5))


def repeated(client: httpx.Client, user_id: str, sign: Sign, text: str) -> str:
    """A text with what the user's stored phrases propose of it in capitals, and the rest as dots."""
    stored = client.get(f"/users/{user_id}/export").raise_for_status().json()["phrases"]
    said = proposals(decode_phrases(base64.b64decode(stored)), answer_ids(sign.trainer.tokenizer, [text])[0])
    return "".join(char.upper() if each.share else "." for char, each in zip(text, said, strict=False))


def test_phrases_are_of_all_own_texts_and_follow_the_items(client: httpx.Client, user_id: str, sign: Sign) -> None:
    put(client, user_id, [pair("a", "when?", "yours, ada"), {"text": "yours, kai"}])
    assert client.get(f"/users/{user_id}").json()["phrases"] is None
    sign()
    assert client.get(f"/users/{user_id}").json()["phrases"] > 0
    assert repeated(client, user_id, sign, "yours, eve") == "YOURS, ..."
    put(client, user_id, [pair("a", "yours, when?", "bye, ada"), pair("b", "yours, who?", "bye, kai")])
    sign()
    assert [repeated(client, user_id, sign, text) for text in ("yours,", "bye,")] == ["......", "BYE,"]


def test_a_bank_without_trust_stores_no_phrases(
    client: httpx.Client, user_id: str, sign: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    sign()
    assert repeated(client, user_id, sign, "0 yes") == "..YES"
    put(client, user_id, SAMPLES[:4])
    monkeypatch.setattr(sign.trainer, "manifest", sign.trainer.manifest.model_copy(update={"phrases": None}))
    sign()
    assert repeated(client, user_id, sign, "0 yes") == "....."
