"""A fleet moves from one bank to the next: one engine that has both, gateways replaced one by one, under load."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from bank.manifest import read_manifest
from bench.rig.engine import running_engine
from bench.rig.processes import PATIENCE_S, wait_until
from bench.rig.tiny import tiny_bank, world
from server.settings import Settings
from tests.support.gateway import GatewayThread, generate

USERS = [f"mover-{number}" for number in range(4)]
ANSWERS = 2000  # what a load gives up after


@dataclass(slots=True)
class Balancer:
    """As a load balancer does it: requests go to the gateways that are in, and who is taken out first finishes."""

    gateways: list[GatewayThread] = field(default_factory=list)
    open: Counter[str] = field(default_factory=Counter)
    turn: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def gateway(self) -> Iterator[str]:
        """The URL of the next one, for one request."""
        with self._lock:
            self.turn += 1
            url = self.gateways[self.turn % len(self.gateways)].url
            self.open[url] += 1
        try:
            yield url
        finally:
            with self._lock:
                self.open[url] -= 1

    def take_out(self, gateway: GatewayThread) -> None:
        """Send it nothing more, and wait until it has answered."""
        with self._lock:
            self.gateways.remove(gateway)
        wait_until(lambda: self.open[gateway.url] == 0, "the gateway to finish")


class Load:
    """Every user asks, over and over, until the block ends; `banks` and `faults` say what came."""

    def __init__(self, balancer: Balancer) -> None:
        self.banks: list[str] = []
        self.faults: list[str] = []
        self._balancer = balancer
        self._over = threading.Event()
        self._pool = ThreadPoolExecutor(len(USERS))

    def __enter__(self) -> Load:
        for user in USERS:
            self._pool.submit(self._ask, user)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._pool.shutdown()

    def goes_on(self, answers: int = 20) -> None:
        """Wait for some more answers."""
        target = len(self.banks) + answers
        wait_until(lambda: len(self.banks) >= target or bool(self.faults), "answers")

    def _ask(self, user: str) -> None:
        with httpx.Client(timeout=PATIENCE_S) as client:
            while not self._over.is_set() and len(self.banks) < ANSWERS:
                with self._balancer.gateway() as url:
                    client.base_url = httpx.URL(url)
                    try:
                        answer = generate(client, user)
                        told = answer.json()["personalization"]
                        assert (answer.status_code, told["level"]) == (200, "merged"), answer.text
                        self.banks.append(told["recipe"].split(":")[1])
                    except Exception as fault:
                        self.faults.append(repr(fault))


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, embedder_folder: Path) -> list[Path]:
    """Two that adapt different modules, parts of packed ones among them, at different ranks."""
    old, new = tmp_path_factory.mktemp("old"), tmp_path_factory.mktemp("new")
    tiny_bank(old, tiny_model_folder, embedder_folder, anchors=4, targets=["q_proj", "down_proj"], scale=0.2)
    targets = ["v_proj", "o_proj", "gate_proj"]
    tiny_bank(new, tiny_model_folder, embedder_folder, anchors=5, rank=16, targets=targets, scale=0.2, seed=2)
    return [old, new]


def test_gateways_move_to_a_bank_of_other_modules_under_load_without_an_error(
    banks: list[Path], tiny_model_folder: Path, gateway_settings: Settings
) -> None:
    old, new = (read_manifest(folder).short for folder in banks)
    with ExitStack() as stack:
        engine = stack.enter_context(
            running_engine(
                banks[0], tiny_model_folder, next_bank=banks[1], max_loras=2, redis_url=gateway_settings.redis_url
            )
        )
        update = {"engine_url": engine.url, "queue_places": len(USERS)}  # the engine has fewer places than users
        settings = [gateway_settings.model_copy(update={"bank": bank, **update}) for bank in banks]

        def gateway(of: Settings) -> GatewayThread:
            started: GatewayThread = stack.enter_context(GatewayThread(of))
            with started.client() as client:
                wait_until(lambda: client.get("/ready").status_code == httpx.codes.OK, "a gateway to be ready")
            return started

        pair = [gateway(settings[0]) for _ in range(2)]
        balancer = Balancer(list(pair))
        with pair[0].client() as client:
            for number, user in enumerate(USERS):
                client.put(f"/users/{user}/profile", json={"items": [{"text": world(number)}]}).raise_for_status()
        with Load(balancer) as load:
            load.goes_on()
            assert set(load.banks) == {old}
            for before in pair:
                balancer.gateways.append(gateway(settings[1]))
                balancer.take_out(before)
                before.__exit__(None, None, None)
                load.goes_on()
            moved = len(load.banks)
            load.goes_on()
        assert not load.faults
        assert set(load.banks[moved:]) == {new}
        assert set(load.banks) == {old, new}

    with (
        running_engine(banks[1], tiny_model_folder, redis_url=gateway_settings.redis_url) as engine,
        GatewayThread(settings[1].model_copy(update={"engine_url": engine.url})) as alone,
        Load(Balancer([alone])) as load,
    ):
        load.goes_on()
    assert not load.faults
    assert set(load.banks) == {new}
