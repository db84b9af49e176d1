"""`mta bench fleet rolling`: replace every part and the bank under load, without a failed request.

Two gateways, a router and two engines are separate processes, each stopped (SIGTERM) and restarted one at a time:
engines with the current and the next bank, gateways with the next one, engines with only the next one, and the router.
Clients act like a load balancer: if one gateway takes no connection, they ask the other.
"""

from __future__ import annotations

import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated

import httpx
import typer

from bank.manifest import read_manifest
from bank.models.folders import ensure_embedder
from bench import script
from bench.page.report import console, marked, report
from bench.rig.engine import KEY
from bench.rig.processes import Background, answers, mta, running, wait_until
from bench.rig.router import running_router
from bench.rig.tiny import WORLDS, tiny_bank, tiny_model
from bench.rig.up import cleared_settings
from bench.rig.valkey import ValkeyProcess
from mta_client import Client
from server.engine_protocol import STATUS
from server.settings import load_settings
from server.supervisor.services import free_port

CLIENTS, PEOPLE, TOKENS = 3, 8, 48
PAUSE_S = 0.1
READY_S, STOP_S, ANSWER_S = 120.0, 60.0, 60.0
CALM_S = 3.0
"""Seconds between two restarts: gateways check engines every two seconds, routers every second."""

Environment = dict[str, str | None]
SECRET = "the secret of a fleet that is rolled"


class Replaceable:
    """A process that can be replaced by another on the same port."""

    def __init__(self, command: list[str], url: str, headers: dict[str, str] | None = None) -> None:
        self._command, self._url, self._headers = command, url, headers or {}
        self._running = ExitStack()
        self._process: Background | None = None

    def start(self, environment: Environment) -> None:
        """Start the process, and wait until it is ready."""
        self._process = process = self._running.enter_context(running(self._command, environment))

        def ready() -> bool:
            assert process.process.poll() is None, process.output
            return answers(self._url, self._headers)

        wait_until(ready, f"{self._command[-1]} to be ready", READY_S)

    def stop(self) -> None:
        """Ask the process to stop, and wait until it has."""
        assert self._process
        self._process.process.terminate()
        self._process.wait(STOP_S)
        self._running.close()

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.process.pid

    def kill(self) -> None:
        """Kill the process and its children, which get no time for anything."""
        assert self._process
        os.killpg(self.pid, signal.SIGKILL)
        self._process.wait(STOP_S)
        self._running.close()

    def exchange(self, environment: Environment) -> None:
        """Stop the process, and start another in its place."""
        self.stop()
        self.start(environment)


class Load(threading.Thread):
    """A client that sends one request after the other to any gateway that accepts the connection.

    Attributes:
        left_out: URL of a gateway that gets no new requests, as a load balancer would have it; empty if all do.
    """

    def __init__(self, urls: list[str], seed: int, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(daemon=True)
        self.failures: list[str] = []
        self.recipes: Counter[str] = Counter()
        fresh = httpx.Limits(
            max_keepalive_connections=0
        )  # one that the gateway has closed would look like a lost request
        self._clients = {
            url: httpx.Client(base_url=url, headers=headers, timeout=ANSWER_S, limits=fresh) for url in urls
        }
        self.left_out = ""
        self._chance = random.Random(seed)
        self._stop_asked = threading.Event()

    def stop(self) -> None:
        """Stop after the current request; a request that does not end counts as failed."""
        self._stop_asked.set()
        self.join(ANSWER_S)
        if self.is_alive():
            self.failures.append(f"an answer did not end within {ANSWER_S:.0f} s")

    def run(self) -> None:
        while not self._stop_asked.wait(PAUSE_S):
            user = f"rolled-{self._chance.randrange(PEOPLE)}"
            body = {"user_id": user, "prompt": self._chance.choice(WORLDS), "max_tokens": TOKENS, "history": 0}
            if self._chance.random() < 0.2:
                self._one("PUT", f"/users/{user}/profile", {"items": [{"text": self._chance.choice(WORLDS)}]})
            elif answer := self._one("POST", "/generate", body | {"stream": self._chance.random() < 0.5}):
                self.recipes[_recipe(answer)[:13]] += 1

    def _one(self, method: str, path: str, body: dict[str, object]) -> str | None:
        asked = [url for url in self._clients if url != self.left_out]
        for url in self._chance.sample(asked, len(asked)):
            try:
                response = self._clients[url].request(method, path, json=body)
            except Exception as error:  # any failure of a request; this thread must continue
                if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                    continue
                self.failures.append(f"{method} {path}: {error!r}")
                return None
            if response.is_success and (not body.get("stream") or response.text.rstrip().endswith("data: [DONE]")):
                return response.text
            self.failures.append(f"{method} {path}: {response.status_code} {response.text[-200:]}")
            return None
        self.failures.append(f"{method} {path}: no gateway took the connection")
        return None


def _recipe(answer: str) -> str:
    """Return the recipe of an answer."""
    return answer.partition('"recipe":"')[2].partition('"')[0]


class RollingFleet:
    """The fleet, its next bank, and the steps that replace its parts.

    Args:
        folder: folder for all data.
        running: stack of the running processes.
    """

    def __init__(self, folder: Path, running: ExitStack) -> None:
        chosen = load_settings()
        model, embedder = tiny_model(folder / "model"), ensure_embedder(chosen.embedder, chosen.cache_dir)
        bank, self.next = (tiny_bank(folder / name, model, embedder, seed=n) for n, name in enumerate(("bank", "next")))
        self.store = store = ValkeyProcess(folder / "valkey").start()
        running.callback(store.kill)
        self._router_port = free_port()
        engines = [free_port() for _ in range(2)]
        self.engine_urls = [f"http://127.0.0.1:{port}" for port in engines]
        self.settings: Environment = cleared_settings() | {
            "MTA_REDIS_URL": store.url,
            "MTA_ENGINE_KEY": KEY,
            "MTA_ENGINE_URLS": ",".join(self.engine_urls),
            "MTA_ENGINE_URL": f"http://127.0.0.1:{self._router_port}",
            "MTA_SECRET": SECRET,
            "MTA_MODEL": str(model),
            "MTA_BANK": str(bank),
            "OMP_NUM_THREADS": "1",  # one engine serves while the other starts on the same machine
        }
        gateways = [free_port() for _ in range(2)]
        self.gateway_urls = [f"http://127.0.0.1:{port}" for port in gateways]
        key = {"Authorization": f"Bearer {KEY}"}
        self.engines = [
            Replaceable(mta("engine", "--port", str(port)), f"http://127.0.0.1:{port}{STATUS}", key) for port in engines
        ]
        self.gateways = [
            Replaceable(mta("gateway", "--port", str(port)), f"http://127.0.0.1:{port}/ready") for port in gateways
        ]
        self._router = ExitStack()
        for engine in self.engines:
            engine.start(self.settings)
            running.callback(engine.stop)
        self.restart_router()
        running.callback(self._router.close)
        for gateway in self.gateways:
            gateway.start(self.settings)
            running.callback(gateway.stop)
        with Client(self.gateway_urls[0]) as client:
            for user in range(PEOPLE):
                client.put_profile(f"rolled-{user}", WORLDS[:1])

    def restart_router(self) -> None:
        """Stop the router, if it is running, and start one on the same port."""
        self._router.close()
        self.router = self._router.enter_context(running_router(self.engine_urls, self._router_port)).process

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield every replacement, in the order in which a new bank is rolled out; the router is last."""
        both = {**self.settings, "MTA_NEXT_BANK": str(self.next)}
        alone = {**self.settings, "MTA_BANK": str(self.next)}
        for engine in self.engines:
            yield "engine, with both banks", partial(engine.exchange, both)
        for gateway in self.gateways:
            yield "gateway, with the next bank", partial(gateway.exchange, alone)
        for engine in self.engines:
            yield "engine, with the next bank alone", partial(engine.exchange, alone)
        yield "router", self.restart_router


def main(out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None) -> None:
    """Replace every part and the bank under load; exit status 1 if a request failed."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as running:
        rolled = RollingFleet(Path(scratch), running)
        loads = [Load(rolled.gateway_urls, seed) for seed in range(CLIENTS)]
        for load in loads:
            load.start()
        shown, exchanged = console(), 0
        time.sleep(CALM_S)
        for what, exchange in rolled.steps():
            exchange()
            time.sleep(CALM_S)
            exchanged += 1
            shown.print(f"exchanged: {what}; {sum(len(load.failures) for load in loads)} requests failed so far")
        for load in loads:
            load.stop()
        asked = {"user_id": "rolled-0", "prompt": "Well?", "max_tokens": 1}
        last = httpx.post(f"{rolled.gateway_urls[0]}/generate", json=asked).raise_for_status().text
        moved = _recipe(last).startswith(f"mta3:{read_manifest(rolled.next).short}")
    failures = [failure for load in loads for failure in load.failures]
    recipes = sum((load.recipes for load in loads), Counter[str]())
    impersonal = recipes.pop("", 0)
    rows = [
        ("parts exchanged under load", str(exchanged)),
        ("answers", f"{recipes.total():,}"),
        ("answers by bank", ", ".join(f"{name}: {count:,}" for name, count in recipes.items())),
        ("answers by the base model", marked(impersonal, not impersonal)),
        ("requests that failed", marked(f"{len(failures)} {failures[:3] or ''}".strip(), not failures)),
        ("the next bank serves", marked("yes" if moved else "no", moved)),
    ]
    report("two gateways, a router and two engines, all exchanged under load", rows, out)


if __name__ == "__main__":
    script(main)
