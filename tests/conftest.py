"""Real parts that many tests share: an embedder, a tiny bank, a Valkey, and a gateway over a fake engine."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from bank.manifest import read_manifest
from bank.models.folders import ensure_embedder
from bench.rig.engine import Engine, running_engine
from bench.rig.valkey import ValkeyProcess
from server.settings import Settings
from tests.support.fake_engine import KEY, FakeEngine, Knobs
from tests.support.gateway import SECRET, GatewayThread

HERE = Path(__file__).parent
DEAR_FIRST = (
    "e2e/test_demo_answers.py",  # makes the demo's bank, for which test_demo_run would wait
    "integration/test_engine_oracle.py",
    "integration/test_faults.py",
    "integration/test_fleet.py",
    "integration/test_adapting.py",
    "contract/test_engine.py",
    "integration/test_engine_plugin.py",
    "integration/test_erasing_everywhere.py",
    "integration/test_worker_process.py",
    "integration/test_bank_exchange.py",
    "e2e/test_demo_run.py",
    "e2e/console/test_console.py",
    "integration/test_containers.py",
    "contract/test_store_model.py",
    "integration/test_watched.py",
    "integration/test_documented.py",
    "integration/test_bank_build.py",
    "integration/test_eval_engine.py",
    "integration/test_bench.py",
    "integration/test_up.py",
)
"""What takes longest, so that no core waits for it at the end."""
_numbers = itertools.count()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files by what they cost."""
    places = {HERE / file: place for place, file in enumerate(DEAR_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_unconfigure() -> None:
    """Have what gateways keep from being collected go in the end: nanobind would list it as leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def embedder_folder() -> Path:
    """The default embedder, made on first use."""
    return ensure_embedder(None, Settings().cache_dir)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama."""
    from bench.rig.tiny import tiny_model  # imports torch

    return tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_bank_folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, embedder_folder: Path) -> Path:
    """A bank of six random anchors, for the tiny model."""
    from bench.rig.tiny import tiny_bank

    return tiny_bank(tmp_path_factory.mktemp("tiny") / "bank", tiny_model_folder, embedder_folder, anchors=6)


@pytest.fixture(scope="session")
def tiny_engine(tiny_bank_folder: Path, tiny_model_folder: Path) -> Iterator[Engine]:
    """A real engine with the tiny bank."""
    with running_engine(tiny_bank_folder, tiny_model_folder) as engine:
        yield engine


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ValkeyProcess]:
    """A durable Valkey; tests use users of their own."""
    server = ValkeyProcess(tmp_path_factory.mktemp("valkey")).start()
    yield server
    server.kill()


@pytest.fixture(scope="session")
def fake_engine_server(tiny_bank_folder: Path) -> Iterator[FakeEngine]:
    """A fake engine that says it serves the tiny bank."""
    engine = FakeEngine(Knobs(banks=(read_manifest(tiny_bank_folder).fingerprint,))).start()
    yield engine
    engine.stop()


@pytest.fixture
def fake_engine(fake_engine_server: FakeEngine) -> FakeEngine:
    """The fake engine with its knobs at rest and nothing seen."""
    fake_engine_server.reset()
    return fake_engine_server


@pytest.fixture(scope="session")
def gateway_settings(
    tiny_bank_folder: Path, embedder_folder: Path, valkey: ValkeyProcess, fake_engine_server: FakeEngine
) -> Iterator[Settings]:
    """Settings of a gateway over these parts, which it looks at more often than otherwise: so nobody waits for it."""
    with pytest.MonkeyPatch.context() as patched:
        for constant in ("operating.health.PROBE_INTERVAL_S", "parts.PROBE_INTERVAL_S", "parts.REFRESH_INTERVAL_S"):
            patched.setattr(f"server.gateway.{constant}", 0.2)
        yield Settings(
            bank=tiny_bank_folder,
            embedder=embedder_folder,
            redis_url=valkey.url,
            secret=SECRET,
            engine_url=fake_engine_server.url,
            engine_key=KEY,
        )


@pytest.fixture(scope="session")
def gateway(gateway_settings: Settings) -> Iterator[GatewayThread]:
    with GatewayThread(gateway_settings) as running:
        yield running


@pytest.fixture
def client(gateway: GatewayThread, fake_engine: FakeEngine) -> Iterator[httpx.Client]:
    """A client of the gateway, the fake engine at rest."""
    with gateway.client() as client:
        yield client


@pytest.fixture
def new_user() -> Callable[[], str]:
    """Makes user ids that no other test uses."""
    return lambda: f"user-{next(_numbers)}"


@pytest.fixture
def ada(client: httpx.Client, new_user: Callable[[], str]) -> str:
    """A user who writes about the first anchor's world, and a little about the third's."""
    from bench.rig.tiny import world  # imports torch

    user_id = new_user()
    items = [{"text": world(0)}, {"text": f"{world(0)} again"}, {"text": world(2)}]
    client.put(f"/users/{user_id}/profile", json={"items": items}).raise_for_status()
    return user_id
