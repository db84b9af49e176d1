"""Banks that are built here, from scratch, for a module at a time; a worker that trains on demand, and jobs for it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.training.user_trainer import Judgement, TrainingProgress, TrainingRun
from bank.lookup.serving import ServingBank
from bank.manifest import BankManifest, LossDifference, Verdict, read_manifest
from bench.rig.engine import Engine
from bench.rig.valkey import ValkeyProcess
from server.observability.audit import audit_to
from server.observability.tracing import Tracing
from server.settings import Settings
from server.worker.loops import JobLoop
from server.worker.training import AdapterTrainer
from tests.support.bank_bench import Bench
from tests.support.desk import Desk, desk_at
from tests.support.gateway import SECRET, GatewayThread, wait_until_ready
from tests.support.observe.receiver import Receiver, receiving
from tests.support.store_parts import StoreParts
from tests.support.watchdog import never_held

Work = Callable[..., None]
"""Has a worker train whatever there is; the first argument is called at the first step, `tracing` traces it."""


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    """Receives traces."""
    with receiving() as running:
        yield running


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The audit log of gateways and commands."""
    path = tmp_path / "audit.jsonl"
    monkeypatch.setenv("MTA_AUDIT", str(path))
    monkeypatch.setenv("MTA_SECRET", SECRET)
    audit_to(path)
    yield path
    audit_to(None)


@pytest.fixture
def free_event_loop(gateway: GatewayThread) -> Iterator[None]:
    """Fails a test that kept the gateway's event loop for too long."""
    with never_held(gateway.thread):
        yield


@pytest.fixture
def known_context(client: httpx.Client) -> None:
    """A gateway that has looked at its engine, and knows how much fits into a prompt."""
    wait_until_ready(client)


@pytest.fixture
def helpful(gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank that was found to gain by one past item in the prompt."""
    better = LossDifference(mean=-0.2, low=-0.3, high=-0.1)
    found = Verdict(people=7, losses={}, merged=better, recalled=better, both=better, beyond=better, history=1)
    manifest = gateway.parts.bank.manifest.model_copy(update={"verdict": found})
    monkeypatch.setattr(gateway.parts.bank, "manifest", manifest)


@pytest.fixture(scope="module")
def gateway_over_vllm(gateway_settings: Settings, tiny_engine: Engine) -> Iterator[GatewayThread]:
    """A gateway over a real engine, where two people are known: rosa and kai."""
    from bench.rig.tiny import world  # imports torch

    with GatewayThread(gateway_settings, engine_url=tiny_engine.url) as gateway, gateway.client() as client:
        wait_until_ready(client)
        for user, place in (("rosa", 1), ("kai", 4)):
            client.put(f"/users/{user}/profile", json={"items": [{"text": world(place)}]}).raise_for_status()
        yield gateway


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from bench.rig.tiny import tiny_model  # imports torch

    return tiny_model(tmp_path_factory.mktemp("model"), context=2048)  # for answers that outlive those beside them


@pytest.fixture(scope="session")
def bank(tmp_path_factory: pytest.TempPathFactory, model: Path, embedder_folder: Path) -> Path:
    from bench.rig.tiny import tiny_bank

    return tiny_bank(tmp_path_factory.mktemp("bank"), model, embedder_folder, anchors=40, scale=0.2)


@pytest.fixture(scope="module")
def prefix(bank: Path) -> str:
    """How recipes of `bank`, or of a module's own, begin."""
    return f"mta3:{read_manifest(bank).short}:shared"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, embedder_folder: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("build"), tiny_model_folder, embedder_folder)


@pytest.fixture(scope="module")
def built(bench: Bench) -> BankManifest:
    """The bank of `OPTIONS`, in the folder `plain`."""
    return bench.build("plain")


@pytest.fixture(scope="module")
def trainer(tiny_bank_folder: Path, tiny_model_folder: Path) -> AdapterTrainer:
    return AdapterTrainer.open(tiny_bank_folder, read_manifest(tiny_bank_folder), tiny_model_folder, "float32")


@pytest.fixture
def work(trainer: AdapterTrainer, tiny_bank_folder: Path, valkey: ValkeyProcess) -> Work:
    return working(valkey.url, trainer, tiny_bank_folder)


def working(url: str, trainer: AdapterTrainer, bank_folder: Path) -> Work:
    """A worker in the test's own process, on the stores at a URL."""
    bank = ServingBank.open(bank_folder, trainer.manifest.embedder.id)

    async def all_of_it(meanwhile: Callable[[], object] = lambda: None, tracing: Tracing | None = None) -> None:
        async with StoreParts.opened(url) as parts:
            interrupted = Interrupted(trainer, meanwhile)
            worker = JobLoop(
                parts.jobs,
                parts.profiles,
                parts.feedback,
                parts.adapters,
                bank=bank,
                trainer=interrupted,
                tracing=tracing or Tracing(),
            )
            while await worker.work_once(0.1):
                pass

    return lambda *given, **named: asyncio.run(all_of_it(*given, **named))


@pytest.fixture(scope="module")
def store(memory: Path) -> Iterator[ValkeyProcess]:
    """One that a test may stop, start again and empty."""
    with ValkeyProcess(Path(tempfile.mkdtemp(dir=memory))) as server:
        yield server


@pytest.fixture
async def desk(store: ValkeyProcess, trainer: AdapterTrainer) -> AsyncIterator[Desk]:
    """Users and jobs of the tiny bank in that store, which holds nothing else."""
    async with desk_at(store.url, trainer.manifest) as desk:
        yield desk


class Interrupted:
    """A trainer that lets something happen at its first step, and at every one."""

    def __init__(
        self,
        trainer: AdapterTrainer,
        meanwhile: Callable[[], object],
        at_step: Callable[[int], object] = lambda step: None,
    ) -> None:
        self._trainer, self._meanwhile, self._at_step = trainer, meanwhile, at_step
        self.encoded = trainer.encoded

    def train(self, *given: Any) -> TrainingRun:
        return TrainingRun(self._hooked(self._trainer.train(*given)))

    def _hooked(self, training: TrainingRun) -> Generator[TrainingProgress, None, Judgement]:
        step = 0
        for progress in training:
            if progress.step > step:
                step = progress.step
                if step == 1:
                    self._meanwhile()
                self._at_step(step)
            yield progress
        assert training.judgement is not None
        return training.judgement
