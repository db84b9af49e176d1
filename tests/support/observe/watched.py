"""`mta up` with full observability: Prometheus, a trace collector, and JSON logs."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from bench.rig.processes import wait_until
from bench.rig.tiny import WORLDS
from bench.rig.up import Up, up
from server.supervisor.services import free_port
from tests.support.observe.prometheus import HURRY_S, Prometheus, Target, prometheus
from tests.support.observe.receiver import Receiver, receiving

PEOPLE = dict(zip(("adaline", "ben", "cleo", "dan", "eve", "finn"), WORLDS, strict=True))
STACKED = "adaline"
SAMPLES = [{"input": f"question {n}", "output": f"{n} yes yes yes"} for n in range(8)]


@dataclass(frozen=True, slots=True)
class Watched:
    """The running server and its observers."""

    server: Up
    receiver: Receiver
    prometheus: Prometheus
    began_s: float  # when people began to use it, Unix time

    @property
    def client(self) -> httpx.Client:
        """A new client of the gateway."""
        return self.server.client()

    def log(self, part: str) -> str:
        """Return the log of a part."""
        return (self.server.data / "logs" / f"{part}.log").read_text("utf-8")


@contextmanager
def watched(folder: Path, *options: str, **environment: str) -> Iterator[Watched]:
    """Run a server with every part observed from its start."""
    key, port = secrets.token_urlsafe(16), free_port()
    with receiving() as receiver:
        settings = environment | {
            "MTA_ENGINE_KEY": key,
            "MTA_LOG_FORMAT": "json",
            "MTA_METRICS_PORT": str(port),
            "MTA_OTLP_ENDPOINT": receiver.url,
        }
        with up(folder / "data", *options, environment=settings) as server:
            engine = re.search(r"engine +ready +(\S+)", server.process.output)
            assert engine, server.process.output
            targets = {
                "gateway": Target(server.url.removeprefix("http://")),
                "engine": Target(engine[1], key),
                "worker": Target(f"127.0.0.1:{port}"),
            }
            with prometheus(folder, targets) as asking:
                wait_until(lambda: all(map(asking.up, targets)), "Prometheus to see every part")
                yield Watched(server, receiver, asking, time.time())


def use(run: Watched, seconds: float) -> None:
    """Simulate users for some time: they write and ask, with and without streams, and one of them is adapted."""
    with run.client as client:
        for user, text in PEOPLE.items():
            client.put(f"/users/{user}/profile", json={"items": [{"text": text}]}).raise_for_status()
        _ask(client)
        wait_until(lambda: len(run.prometheus.asked("mta_ttft_seconds_count")) > 1, "the first answers to be seen")
        config = {"steps": 6, "learning_rate": 0.05}
        job = client.post(f"/users/{STACKED}/adapt", json={"samples": SAMPLES, "config": config}).raise_for_status()
        until_s = time.monotonic() + seconds
        ended = False
        while time.monotonic() < until_s or not ended:
            _ask(client)
            state = client.get(f"/jobs/{job.json()['id']}").raise_for_status().json()
            ended = state["ended_at"] is not None
            time.sleep(HURRY_S / 4)
        assert state["state"] == "succeeded", state
        _ask(client)
        run.prometheus.looked()


def _ask(client: httpx.Client) -> None:
    for user in (*PEOPLE, "somebody"):
        body = {"user_id": user, "prompt": "Tell me about it.", "max_tokens": 12}
        client.post("/generate", json=body).raise_for_status()
        client.post("/generate", json=body | {"stream": True}).raise_for_status()
    client.post("/generate", json={"user_id": STACKED, "prompt": ""})
