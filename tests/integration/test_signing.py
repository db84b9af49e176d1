"""Signatures, from a profile that changes to the answer that follows them: a real gateway, Valkey and worker loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import torch

from bank.lookup.serving import ServingBank
from bank.lookup.signature import Signature
from bank.manifest import read_manifest
from bench.rig.tiny import tiny_bank, world
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.settings import Settings
from server.store.profiles import ProfileStore
from server.store.queue import UserQueue
from server.store.redis.servers.connection import RedisConnection
from server.worker.signing_loop import MAX_TRIES, SigningLoop
from server.worker.training import AdapterTrainer
from server.worker.training_thread import Stalled
from tests.support.fake_engine import FakeEngine, Knobs
from tests.support.gateway import GatewayThread, generate

PAIRS = [{"input": f"question {n}", "output": f"{n} yes yes yes"} for n in range(8)]


class Awaited(asyncio.Lock):
    """A lock that is held by others while something happens."""

    def __init__(self, meanwhile: Callable[[], Awaitable[object]]) -> None:
        super().__init__()
        self._meanwhile = meanwhile

    async def acquire(self) -> Literal[True]:
        await self._meanwhile()
        return await super().acquire()


class Sign:
    """Makes all signatures that are wanted now; `meanwhile` happens while the first is made, `before` while each waits
    for the model."""

    def __init__(self, url: str, bank: ServingBank, trainer: AdapterTrainer) -> None:
        self._url, self._bank, self.trainer = url, bank, trainer
        self.made = 0

    def __call__(
        self,
        meanwhile: Callable[[], object] = lambda: None,
        before: Callable[[UserQueue], Awaitable[object]] | None = None,
    ) -> None:
        self.made, self._meanwhile = 0, meanwhile
        asyncio.run(self._all(before))

    def signature(self, pairs: Sequence[tuple[str, str]]) -> Signature:
        self.made += 1
        if self.made == 1:
            self._meanwhile()
        return self.trainer.signature(pairs)

    async def _all(self, before: Callable[[UserQueue], Awaitable[object]] | None) -> None:
        connection = RedisConnection(self._url)
        await connection.check()
        try:
            queue, profiles = UserQueue(connection, "sign", self._bank.manifest.short), ProfileStore(connection)
            lock = Awaited(lambda: before(queue)) if before else asyncio.Lock()
            loop = SigningLoop(queue, profiles, self._bank, self, model_lock=lock)
            while await loop.work_once(0.2):
                pass
        finally:
            await connection.close()


@pytest.fixture(scope="module")
def signed_bank(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, embedder_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("signed") / "bank"
    return tiny_bank(folder, tiny_model_folder, embedder_folder, anchors=6, signs=True)


@pytest.fixture(scope="module")
def sign(signed_bank: Path, tiny_model_folder: Path, valkey: ValkeyProcess) -> Sign:
    trainer = AdapterTrainer.open(signed_bank, read_manifest(signed_bank), tiny_model_folder, "float32")
    return Sign(valkey.url, ServingBank.open(signed_bank, trainer.manifest.embedder.id), trainer)


@pytest.fixture(scope="module")
def signing_client(gateway_settings: Settings, signed_bank: Path) -> Iterator[httpx.Client]:
    """Of a gateway over the signed bank, and an engine of its own that says it serves it."""
    engine = FakeEngine(Knobs(banks=(read_manifest(signed_bank).fingerprint,))).start()
    settings = gateway_settings.model_copy(update={"bank": signed_bank, "engine_url": engine.url})
    with GatewayThread(settings) as gateway, gateway.client() as client:
        yield client
    engine.stop()


@pytest.fixture
def client(signing_client: httpx.Client, sign: Sign) -> httpx.Client:
    """The client, with nobody waiting for a signature."""
    sign()
    return signing_client


def put(client: httpx.Client, user_id: str, items: Sequence[object]) -> None:
    client.put(f"/users/{user_id}/profile", json={"items": items}).raise_for_status()


def source(client: httpx.Client, user_id: str) -> str:
    found: str = generate(client, user_id).json()["personalization"]["source"]
    return found


def test_topics_speak_until_the_signature_is_there(
    client: httpx.Client, new_user: Callable[[], str], sign: Sign
) -> None:
    user_id = new_user()
    put(client, user_id, PAIRS)
    assert source(client, user_id) == "topic"
    sign()
    assert sign.made == 1
    who = generate(client, user_id).json()["personalization"]
    assert who["source"] == client.get(f"/users/{user_id}").json()["source"] == "signature"
    assert all(anchor["gain"] is not None for anchor in who["anchors"])
    gains = [anchor["gain"] for anchor in who["anchors"]]
    assert [abs(gain) for gain in gains] == sorted(map(abs, gains), reverse=True)
    assert all((anchor["weight"] > 0) is (anchor["gain"] > 0) for anchor in who["anchors"])


def test_changes_that_nobody_has_seen_yet_are_one_signature(
    client: httpx.Client, new_user: Callable[[], str], sign: Sign
) -> None:
    user_id = new_user()
    for count in (3, 5, 8):
        put(client, user_id, PAIRS[:count])
    sign()
    assert sign.made == 1
    assert source(client, user_id) == "signature"


def test_a_change_while_a_signature_is_made_is_seen_to(
    client: httpx.Client, new_user: Callable[[], str], sign: Sign
) -> None:
    user_id = new_user()
    put(client, user_id, PAIRS[:4])
    sign(lambda: put(client, user_id, PAIRS))
    assert sign.made == 2
    sign()
    assert sign.made == 0


def test_items_without_outputs_leave_it_to_the_topics_and_are_not_asked_for_again(
    client: httpx.Client, new_user: Callable[[], str], sign: Sign
) -> None:
    user_id = new_user()
    put(client, user_id, [{"text": world(0)}, {"text": world(1)}])
    sign()
    assert sign.made == 1
    assert source(client, user_id) == "topic"
    sign()
    assert sign.made == 0


def test_who_is_erased_meanwhile_stays_so(client: httpx.Client, new_user: Callable[[], str], sign: Sign) -> None:
    user_id = new_user()
    put(client, user_id, PAIRS)
    sign(lambda: client.delete(f"/users/{user_id}").raise_for_status())
    assert client.get(f"/users/{user_id}").status_code == httpx.codes.NOT_FOUND


def test_a_gradient_that_is_no_number_leaves_it_to_the_topics_and_is_not_asked_for_again(
    client: httpx.Client, new_user: Callable[[], str], sign: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_id = new_user()
    put(client, user_id, PAIRS)
    numbers = sign.trainer.manifest.layout.b_numbers
    monkeypatch.setattr("bank.building.signer.b_gradient", lambda *_: torch.full((numbers,), torch.nan))
    sign()
    assert sign.made == 1
    assert source(client, user_id) == "topic"
    sign()
    assert sign.made == 0
    monkeypatch.undo()
    put(client, user_id, PAIRS[:4])
    sign()
    assert source(client, user_id) == "signature"


def test_items_that_cannot_be_encoded_are_signed_as_none_and_the_next_user_is_signed(
    client: httpx.Client, new_user: Callable[[], str], sign: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd, user_id = new_user(), new_user()
    put(client, odd, [*PAIRS, {"input": "odd", "output": "one"}])
    put(client, user_id, PAIRS)
    picky = "{% if messages[0]['content'] == 'odd' %}{{ raise_exception('odd') }}{% endif %}"
    monkeypatch.setattr(sign.trainer.tokenizer, "chat_template", picky + sign.trainer.tokenizer.chat_template)
    sign()
    assert sign.made == 2
    assert (source(client, odd), source(client, user_id)) == ("topic", "signature")


def test_a_signature_over_which_workers_die_is_given_up_after_the_last_try(
    client: httpx.Client, new_user: Callable[[], str], sign: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.store.queue.GRACE_MS", 0)  # what a worker that died had taken is due at once
    user_id = new_user()
    put(client, user_id, PAIRS)

    def no_memory() -> None:
        raise MemoryError

    for _ in range(MAX_TRIES):
        with pytest.raises(MemoryError):
            sign(no_memory)
    sign(no_memory)
    assert sign.made == 0
    assert source(client, user_id) == "topic"
    put(client, user_id, PAIRS[:4])
    sign()
    assert source(client, user_id) == "signature"


def test_a_signature_that_waits_for_the_model_is_made_however_often_its_user_is_called_again(
    client: httpx.Client, new_user: Callable[[], str], sign: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.store.queue.GRACE_MS", 0)  # whoever waits is due at once
    user_id, waits = new_user(), 0
    put(client, user_id, PAIRS[:4])

    async def wait(queue: UserQueue) -> None:
        nonlocal waits
        waits += 1
        if waits <= MAX_TRIES:
            taken = await queue.take(0.05)  # by another worker
            assert taken is not None
            await queue.request(taken)
        elif waits == MAX_TRIES + 1:
            put(client, user_id, PAIRS)

    sign(before=wait)
    assert sign.made == 2
    assert source(client, user_id) == "signature"


def test_a_store_that_is_away_is_no_try(
    client: httpx.Client, new_user: Callable[[], str], sign: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.worker.signing_loop.RETRY_S", 0.01)
    user_id, commit, failures = new_user(), ProfileStore.commit, 0
    put(client, user_id, PAIRS)

    async def away(*args: Any) -> bool:
        nonlocal failures
        failures += 1
        if failures <= MAX_TRIES:
            raise Unavailable("the store cannot be used now")
        return await commit(*args)

    monkeypatch.setattr(ProfileStore, "commit", away)
    sign()
    assert failures == MAX_TRIES + 1
    assert source(client, user_id) == "signature"


def test_a_signature_that_never_comes_ends_the_process(
    client: httpx.Client, new_user: Callable[[], str], sign: Sign, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.worker.signing_loop.STALL_S", 0.1)
    put(client, new_user(), PAIRS)
    with pytest.raises(Stalled):
        sign(lambda: time.sleep(1))
