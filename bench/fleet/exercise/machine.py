"""`mta up --replicas 2` with the tiny model and a separate store that can be killed and can lose answers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from bank.models.folders import ensure_embedder
from bench.rig.engine import KEY, Engine, client_of
from bench.rig.processes import descendants, wait_until
from bench.rig.proxy import LossyProxy
from bench.rig.tiny import tiny_bank, tiny_model
from bench.rig.up import Up, up
from bench.rig.valkey import ValkeyProcess
from server.settings import load_settings

ENGINES = ("engine-1", "engine-2")
PATIENCE_S = 300.0
STORE_AWAY_S = 1.0
"""Seconds from the kill of the store until it is started again, which `mta up` does not do."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The running processes, as the `Parts` of an exercise."""

    up: Up  # `mta up` and its parts
    store: ValkeyProcess  # a separate Valkey, not a part of `mta up`
    lossy: LossyProxy  # the proxy between both

    @property
    def names(self) -> Sequence[str]:
        return "gateway", *ENGINES, "router", "worker", "valkey"

    @property
    def urls(self) -> Sequence[str]:
        return [self.up.url]

    @property
    def headers(self) -> Mapping[str, str]:
        return {}

    def processes(self, name: str) -> list[int]:
        pid = self.store.pid if name == "valkey" else self.up.part(name)
        assert pid, f"{name} does not run"
        return [pid, *descendants(pid)]

    def kill(self, name: str) -> None:
        if name == "valkey":
            self.store.kill()
            time.sleep(STORE_AWAY_S)
            self.store.start()
            return
        starts = self.up.starts(name)
        os.kill(self.processes(name)[0], signal.SIGKILL)
        wait_until(lambda: self.up.starts(name) > starts, f"{name} to be started again", PATIENCE_S)


def wait_for_router(up: Up) -> None:
    """Wait until the router uses every engine: it starts with the first that answers and adds the others later."""
    health = f"http://{up.address('router')}/health"
    wait_until(lambda: httpx.get(health, timeout=60).status_code == httpx.codes.OK, "the router to know every engine")


@contextmanager
def engine_of(up: Up, name: str) -> Iterator[Engine]:
    """Yield one of the engines, which must have the key `KEY`."""
    url = f"http://{up.address(name)}"
    with client_of(url, timeout_s=600) as client:
        yield Engine(url, up.part(name) or 0, client)


@contextmanager
def tiny_machine(
    folder: Path, *options: str, seed: int = 0, environment: Mapping[str, str] | None = None
) -> Iterator[Machine]:
    """Run the machine, and wait until all parts are ready.

    Args:
        folder: folder for model, bank and all data.
        options: further options of `mta up`.
        seed: seed for the choice of lost answers, once `lossy.share` is above 0.
        environment: further settings.
    """
    model = tiny_model(folder / "model")
    settings = load_settings()
    bank = tiny_bank(folder / "bank", model, ensure_embedder(settings.embedder, settings.cache_dir), anchors=6)
    with ValkeyProcess(folder / "valkey") as store, LossyProxy(store.port, seed=seed) as lossy:
        url = f"redis://127.0.0.1:{lossy.port}/0"
        chosen = ("--bank", str(bank), "--model", str(model), "--replicas", "2", "--redis-url", url, *options)
        with up(folder / "data", *chosen, environment={"MTA_ENGINE_KEY": KEY, **(environment or {})}) as started:
            wait_for_router(started)
            yield Machine(started, store, lossy)
