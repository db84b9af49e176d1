"""`mta up --replicas 2` with the tiny model and a separate store that can be killed and can lose answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from bank.models.folders import ensure_embedder
from bench.rig.engine import KEY, Engine, client_of
from bench.rig.processes import wait_until
from bench.rig.proxy import LossyProxy
from bench.rig.tiny import tiny_bank, tiny_model
from bench.rig.up import Up, up
from bench.rig.valkey import ValkeyProcess
from server.settings import load_settings

ENGINES = ("engine-1", "engine-2")


@dataclass(frozen=True, slots=True)
class Machine:
    """The running processes."""

    up: Up  # `mta up` and its parts
    store: ValkeyProcess  # a separate Valkey, not a part of `mta up`
    lossy: LossyProxy  # the proxy between both

    def whole(self) -> bool:
        """Whether the gateway reports all parts as ready."""
        return is_whole(self.up.url)


def is_whole(url: str, headers: Mapping[str, str] | None = None) -> bool:
    """Whether the gateway at this URL reports all parts as ready."""
    try:
        said = httpx.get(f"{url}/ready", headers=headers, timeout=10).json()
    except (httpx.HTTPError, ValueError):
        return False
    return bool(said["status"] == "ready" and said["detail"] is None)


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
