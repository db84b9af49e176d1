"""Jobs and signatures on one model: a real worker's two loops, over a real Valkey."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters.recipe import FusionRecipe
from adapters.training.adapt_config import AdaptConfig
from adapters.training.user_trainer import TrainingRun
from bank.items.profile import Item
from bank.lookup.serving import ServingBank
from bank.lookup.signature import Signature
from bank.manifest import read_manifest
from bench.rig.tiny import tiny_bank
from server.store.jobs import JobState
from server.store.queue import UserQueue
from server.store.samples import decode_config
from server.worker.loops import JobLoop, SigningLoop
from server.worker.training import AdapterTrainer, JobUser
from tests.integration.conftest import Interrupted
from tests.support.desk import Desk

PAIRS = [(f"question {n}", f"{n} yes yes yes") for n in range(4)]


@pytest.fixture(scope="module")
def bank_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, embedder_folder: Path) -> Path:
    return tiny_bank(tmp_path_factory.mktemp("bank"), tiny_model_folder, embedder_folder, anchors=6, signs=True)


@pytest.fixture(scope="module")
def trainer(bank_folder: Path, tiny_model_folder: Path) -> AdapterTrainer:
    return AdapterTrainer.open(bank_folder, read_manifest(bank_folder), tiny_model_folder, "float32")


class Watched(UserQueue):
    """A queue that says when its worker has taken a user."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.taken = threading.Event()

    async def take(self, wait_s: float) -> str | None:
        user_key = await super().take(wait_s)
        if user_key is not None:
            self.taken.set()
        return user_key


class Worker:
    """The two loops; `events` are the steps of training and the signatures. The first step ends with `queue.taken`."""

    def __init__(self, desk: Desk, trainer: AdapterTrainer, bank_folder: Path) -> None:
        self.events, self.recipes, self.begun = list[str](), list[FusionRecipe](), asyncio.Event()
        self.bank, lock = ServingBank.open(bank_folder, trainer.manifest.embedder.id), asyncio.Lock()
        self.queue = Watched(desk.connection, "sign", trainer.manifest.short)
        signer: Any = self
        self.signing = SigningLoop(self.queue, desk.profiles, self.bank, signer, model_lock=lock)
        stores = desk.jobs, desk.profiles, desk.feedback, desk.adapters
        self.jobs = JobLoop(*stores, bank=self.bank, trainer=signer, model_lock=lock, signing=self.signing)
        self._trainer, self._loop, self.encoded = trainer, asyncio.get_running_loop(), trainer.encoded

    def signature(self, pairs: Sequence[tuple[str, str]]) -> Signature:
        self.events.append("signed")
        return self._trainer.signature(pairs)

    def phrases(self, items: Sequence[Item]) -> bytes:
        return self._trainer.phrases(items)

    def train(self, person: JobUser, samples: Any, config: AdaptConfig, learned: Any) -> TrainingRun:
        self.recipes.append(person.recipe(person.signature, config.strength))
        hooked = Interrupted(self._trainer, self._begin, lambda step: self.events.append(f"step {step}"))
        return hooked.train(person, samples, config, learned)

    def _begin(self) -> None:
        self._loop.call_soon_threadsafe(self.begun.set)
        self.queue.taken.wait(10)


@pytest.fixture
async def worker(desk: Desk, trainer: AdapterTrainer, bank_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr("server.worker.loops.MAX_TURN_S", 600.0)  # no turn ends because the machine is slow
    return Worker(desk, trainer, bank_folder)


async def test_users_arriving_beside_a_job_are_signed_between_steps(desk: Desk, worker: Worker) -> None:
    job_id = await desk.submit(user=await desk.user(*PAIRS))
    working = asyncio.create_task(worker.jobs.work_once(1))
    await worker.begun.wait()
    users = [await desk.user(*PAIRS) for _ in range(3)]
    for user_key in users:
        await worker.queue.add(user_key)
    assert await worker.signing.work_once(10)
    profiles = [await desk.profiles.load(user_key) for user_key in users]
    assert all(profile and profile.is_signed(worker.bank.manifest.short) for profile in profiles)
    assert await working
    assert worker.events[:6] == ["signed", "step 1", "signed", "signed", "signed", "step 2"]
    assert (await desk.job(job_id)).state in {JobState.SUCCEEDED, JobState.REJECTED}


async def test_job_taken_before_signature_trains_on_signed_recipe(desk: Desk, worker: Worker) -> None:
    user_key = await desk.user(*PAIRS)
    job_id = await desk.submit(user=user_key)
    worker.queue.taken.set()
    assert await worker.jobs.work_once(1)
    profile, job = await desk.profiles.load(user_key), await desk.job(job_id)
    assert profile and profile.is_signed(worker.bank.manifest.short)
    strength = decode_config(job.config).strength
    (recipe,) = worker.recipes
    assert worker.events[:2] == ["signed", "step 1"]
    assert recipe == worker.bank.personalise(profile.embedding, profile.evidence, strength).recipe
    assert recipe != worker.bank.personalise(profile.embedding, None, strength).recipe
