"""`mta up --replicas 2` on the tiny model, over a store of its own that can be killed, and that loses answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bank.models.folders import ensure_embedder
from bench.rig.engine import KEY
from bench.rig.processes import wait_until
from bench.rig.proxy import LossyProxy
from bench.rig.tiny import tiny_bank, tiny_model
from bench.rig.up import Up, up
from bench.rig.valkey import ValkeyProcess
from server.settings import load_settings

ENGINES = ("engine-1", "engine-2")


@dataclass(frozen=True, slots=True)
class Machine:
    """What runs."""

    up: Up  # `mta up` and its parts
    store: ValkeyProcess  # the Valkey beneath it, not one of its parts
    lossy: LossyProxy  # between the two

    def ready(self) -> dict[str, Any] | None:
        """What the gateway says of all parts; None while it is not there."""
        try:
            answer: dict[str, Any] = httpx.get(f"{self.up.url}/ready", timeout=5).json()
        except (httpx.HTTPError, ValueError):
            return None
        return answer

    def whole(self) -> bool:
        """Whether nothing is missing, as far as the gateway knows."""
        said = self.ready()
        return said is not None and said["status"] == "ready" and said["detail"] is None


def wait_for_router(up: Up) -> None:
    """Wait until the router uses every engine: it begins with the first that answers, and finds the others later."""
    health = f"http://{up.address('router')}/health"
    wait_until(lambda: httpx.get(health).status_code == httpx.codes.OK, "the router to know every engine")


def engine_client(up: Up, name: str) -> httpx.Client:
    """A client of one of the engines, which must have the key `KEY`."""
    headers = {"Authorization": f"Bearer {KEY}"}
    return httpx.Client(base_url=f"http://{up.address(name)}", headers=headers, timeout=600)


@contextmanager
def tiny_machine(
    folder: Path, *options: str, seed: int = 0, environment: Mapping[str, str] | None = None
) -> Iterator[Machine]:
    """The machine, once all of it is ready.

    Args:
        folder: for model, bank and all data.
        options: more of `mta up`'s.
        seed: of which of the store's answers are lost, once `lossy.share` says that some are.
        environment: more of its settings.
    """
    model = tiny_model(folder / "model")
    settings = load_settings()
    bank = tiny_bank(folder / "bank", model, ensure_embedder(settings.embedder, settings.cache_dir), anchors=6)
    store = ValkeyProcess(folder / "valkey").start()
    try:
        with LossyProxy(store.port, seed=seed) as lossy:
            url = f"redis://127.0.0.1:{lossy.port}/0"
            chosen = ("--bank", str(bank), "--model", str(model), "--replicas", "2", "--redis-url", url, *options)
            with up(folder / "data", *chosen, environment={"MTA_ENGINE_KEY": KEY, **(environment or {})}) as started:
                wait_for_router(started)
                yield Machine(started, store, lossy)
    finally:
        store.kill()
