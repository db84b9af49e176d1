"""Two gateways, a router, two engines and perhaps a worker as processes of their own, each of which can be replaced."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from bank.models.folders import ensure_embedder
from bench.fleet.exercise.parts import Replacement
from bench.rig.engine import KEY
from bench.rig.processes import Background, answers, descendants, mta, running, wait_until
from bench.rig.tiny import tiny_bank, tiny_model
from bench.rig.up import cleared_settings
from bench.rig.valkey import ValkeyProcess
from server.engine_protocol import STATUS, key_header
from server.settings import Settings, load_settings
from server.supervisor.services import LIVENESS, free_port, router_command

READY_S, STOP_S = 120.0, 60.0
Environment = dict[str, str | None]
SECRET = "the secret of a fleet that is rolled"


class Process:
    """A process that can be replaced by another on the same port.

    Args:
        command: its command.
        url: what answers 200 once it is ready.
        headers: headers of that request.
    """

    def __init__(self, command: list[str], url: str, headers: Mapping[str, str] | None = None) -> None:
        self._command, self._url, self._headers = command, url, headers or {}
        self._running = ExitStack()
        self._process: Background | None = None

    @property
    def pid(self) -> int:
        assert self._process
        return self._process.process.pid

    def start(self, environment: Environment) -> None:
        """Start the process, and wait until it is ready."""
        self._process = process = self._running.enter_context(running(self._command, environment))

        def ready() -> bool:
            assert process.process.poll() is None, process.output
            return answers(self._url, self._headers)

        wait_until(ready, f"{' '.join(self._command[2:5])} to be ready", READY_S)

    def stop(self) -> None:
        """Ask the process to stop, and wait until it has."""
        assert self._process
        self._process.process.terminate()
        self._end()

    def kill(self) -> None:
        """Kill the process and its children, which get no time for anything."""
        os.killpg(self.pid, signal.SIGKILL)
        self._end()

    def replace(self, environment: Environment) -> None:
        """Stop the process, and start another in its place."""
        self.stop()
        self.start(environment)

    def _end(self) -> None:
        assert self._process
        self._process.wait(STOP_S)
        self._running.close()


class ProcessFleet:
    """The fleet with a tiny model, and its next bank; `ReplaceableParts` and `RotatedParts` of an exercise.

    Args:
        folder: folder for all data.
        ended: stack whose end ends all processes.
        worker: whether there is a worker.
    """

    def __init__(self, folder: Path, ended: ExitStack, *, worker: bool = False) -> None:
        chosen = load_settings()
        model, embedder = tiny_model(folder / "model"), ensure_embedder(chosen.embedder, chosen.cache_dir)
        bank, self.next_bank = (
            tiny_bank(folder / name, model, embedder, seed=n) for n, name in enumerate(("bank", "next"))
        )
        self.store = ValkeyProcess(folder / "valkey").start()
        ended.callback(self.store.kill)
        engines, gateways = ([free_port(), free_port()] for _ in range(2))
        router, router_metrics, worker_metrics = free_port(), free_port(), free_port()
        self._urls = [f"http://127.0.0.1:{port}" for port in gateways]
        engine_urls = ",".join(f"http://127.0.0.1:{port}" for port in engines)
        self.settings: Environment = cleared_settings() | {
            "MTA_REDIS_URL": self.store.url,
            "MTA_ENGINE_KEY": KEY,
            "MTA_ENGINE_URLS": engine_urls,
            "MTA_ENGINE_URL": f"http://127.0.0.1:{router}",
            "MTA_SECRET": SECRET,
            "MTA_MODEL": str(model),
            "MTA_BANK": str(bank),
            "MTA_METRICS_PORT": str(worker_metrics),
            "OMP_NUM_THREADS": "1",  # one engine serves while the other starts on the same machine
        }
        routing = Settings(engine_urls=engine_urls, router_port=router, metrics_port=router_metrics)
        self._parts = {
            **{
                f"engine-{number}": Process(
                    mta("engine", "--port", str(port)), f"http://127.0.0.1:{port}{STATUS}", key_header(KEY)
                )
                for number, port in enumerate(engines, 1)
            },
            "router": Process(router_command(routing)[0], f"http://127.0.0.1:{router}{LIVENESS}"),
            **{
                f"gateway-{number}": Process(mta("gateway", "--port", str(port)), f"http://127.0.0.1:{port}/ready")
                for number, port in enumerate(gateways, 1)
            },
        }
        if worker:
            self._parts["worker"] = Process(mta("worker"), f"http://127.0.0.1:{worker_metrics}/metrics")
        for part in self._parts.values():
            part.start(self.settings)
            ended.callback(part.stop)

    @property
    def names(self) -> Sequence[str]:
        return [*self._parts, "valkey"]

    @property
    def urls(self) -> Sequence[str]:
        return self._urls

    @property
    def headers(self) -> Mapping[str, str]:
        return {}

    @property
    def secret(self) -> str:
        return str(self.settings["MTA_SECRET"])

    def processes(self, name: str) -> list[int]:
        pid = self.store.pid if name == "valkey" else self._parts[name].pid
        return [pid, *descendants(pid)]

    def kill(self, name: str) -> None:
        if name == "valkey":
            self.store.kill()
            self.store.start()
        else:
            self._parts[name].kill()
            self._parts[name].start(self.settings)

    def replacements(self) -> Iterator[Replacement]:
        """Yield the steps in which a new bank is rolled out; the worker, which needs one bank, is last."""
        both = {**self.settings, "MTA_NEXT_BANK": str(self.next_bank)}
        alone = {**self.settings, "MTA_BANK": str(self.next_bank)}
        for kind, how, environment in (
            ("engine", "with both banks", both),
            ("gateway", "with the next bank", alone),
            ("engine", "with the next bank alone", alone),
            ("router", "", alone),
            ("worker", "with the next bank", alone),
        ):
            for name, part in self._parts.items():
                if name.startswith(kind):
                    yield Replacement(name, how, partial(part.replace, environment))
        self.settings = alone

    def with_secret(self, secret: str) -> Iterator[Replacement]:
        self.settings["MTA_SECRET"] = secret
        for name, part in self._parts.items():
            if name.startswith("gateway"):
                yield Replacement(name, "with another secret", partial(part.replace, self.settings))

    def command(self, *words: str) -> str:
        given = {name: value for name, value in (os.environ | self.settings).items() if value is not None}
        done = subprocess.run(mta(*words), env=given, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
