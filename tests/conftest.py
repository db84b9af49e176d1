"""Real parts that many tests share: an embedder, a tiny bank, a Valkey, and a gateway over a fake engine."""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import settings as hypothesis
from xdist.scheduler import LoadFileScheduling

from bank.lookup.embedder import Embedder
from bank.manifest import read_manifest
from bank.models.folders import ensure_embedder
from bench.rig.engine import Engine, running_engine
from bench.rig.valkey import DURABLE, ValkeyProcess
from server.settings import Settings
from server.supervisor import services
from tests.support.fake_engine import KEY, FakeEngine, Knobs
from tests.support.gateway import SECRET, GatewayThread
from tests.support.valkeys.cluster import ValkeyCluster

HERE = Path(__file__).parent
DEAR_FIRST = (
    *("e2e/test_demo", "integration/test_engine_oracle", "integration/test_faults", "integration/test_fleet"),
    *("integration/test_bench", "contract/test_engine", "integration/test_gateway_over_vllm"),
    *("integration/test_engine_plugin", "integration/test_architectures", "integration/test_worker_process"),
    *("integration/test_containers", "contract/test_store_model", "integration/test_adapting"),
    *("integration/test_bank_exchange", "integration/test_watched", "integration/test_documented"),
    *("integration/test_bank_build", "integration/test_up"),
)
"""What takes longest, so that no core waits for it at the end."""
hypothesis.register_profile("steady", deadline=None, derandomize=True)  # a run fails by what changed alone
hypothesis.load_profile("steady")
_numbers = itertools.count()


class FileScheduling(LoadFileScheduling):
    """A file runs in one process; the two files that share an engine run in the same one."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return file.replace("tests/integration/test_gateway_over_vllm.py", "tests/contract/test_engine.py")


def pytest_configure() -> None:
    """Give each process of a run ports of its own, which servers beside it do not take.

    A port is free until its server has started, which may take long.
    """
    number, processes = (os.environ.get(f"PYTEST_XDIST_WORKER{what}", "") for what in ("", "_COUNT"))
    if processes:
        services.PORT_RANGE = range(10_000, 15_000)[int(number.removeprefix("gw")) :: int(processes)]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FileScheduling | None:
    return FileScheduling(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort files by what they cost."""
    places = {HERE / f"{file}.py": place for place, file in enumerate(DEAR_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_unconfigure() -> None:
    """Have what gateways keep from being collected go in the end: nanobind would list it as leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def one_priority() -> Iterator[None]:
    """A command that tests call in this process lowers its own priority: not that of all tests after it."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("server.observability.background.lower_priority", lambda: None)
        yield


@pytest.fixture(scope="session")
def embedder_folder() -> Path:
    """The default embedder, made on first use."""
    return ensure_embedder(None, Settings().cache_dir)


@pytest.fixture(scope="session")
def embedder(embedder_folder: Path) -> Embedder:
    return Embedder.load(embedder_folder)


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
    with running_engine(
        tiny_bank_folder,
        tiny_model_folder,
        default_sampling='{"temperature": 0.7, "top_k": 50}',
        tool_parser="hermes",
    ) as engine:
        yield engine


@pytest.fixture(scope="session")
def memory() -> Iterator[Path]:
    """A folder for the data of stores, in memory where the machine has such a place: what a disk would add is time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def valkey(memory: Path) -> Iterator[ValkeyProcess]:
    """A durable Valkey; tests use users of their own."""
    with ValkeyProcess(memory / "valkey") as server:
        yield server


@pytest.fixture(scope="module")
def followed(memory: Path) -> Iterator[ValkeyCluster]:
    """Three primaries that go on when one is gone; the first of them has a replica."""
    options = (*DURABLE, "--cluster-require-full-coverage", "no")
    running = ValkeyCluster(Path(tempfile.mkdtemp(dir=memory)), options, replicas=1).start()
    yield running
    running.kill()


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
        for constant in ("operating.health.PROBE_INTERVAL_S", "opening.PROBE_INTERVAL_S", "opening.REFRESH_INTERVAL_S"):
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


@pytest.fixture(scope="module")  # asyncio is not to be had while it runs
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from deploy.console.browser import chromium, running_browser  # imports Playwright

    executable = chromium()
    if executable is None:
        pytest.skip("this machine has no Chromium: `deploy/setup.sh tools` installs it where it can")
    with running_browser(executable) as started:
        yield started


@pytest.fixture(scope="module")
def rewriting(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    embedder_folder: Path,
    gateway_settings: Settings,
    fake_engine_server: FakeEngine,
) -> Iterator[GatewayThread]:
    """A gateway with a bank for drafts."""
    from bench.rig.tiny import tiny_bank  # imports torch

    folder = tmp_path_factory.mktemp("drafts") / "bank"
    bank = tiny_bank(folder, tiny_model_folder, embedder_folder, task="rewrite", anchors=6, seed=3)
    before = fake_engine_server.knobs.banks
    fake_engine_server.knobs.banks = (*before, read_manifest(bank).fingerprint)
    with GatewayThread(gateway_settings, bank=bank) as gateway:
        yield gateway
    fake_engine_server.knobs.banks = before
