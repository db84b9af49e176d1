"""A real vLLM with the plugin, started as `mta engine` starts it, for the length of a test module."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

KEY = "test-engine-key"
START_TIMEOUT_S = 180


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine.

    Attributes:
        url: where it listens.
        pid: of the API process, which leads a process group of its own.
        client: an HTTP client that carries its key.
    """

    url: str
    pid: int
    client: httpx.Client

    def chat(self, model: str, text: str = "hello there", **options: object) -> httpx.Response:
        """One greedy chat completion of 8 tokens, unless options say otherwise."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
        return self.client.post("/v1/chat/completions", json=body | options)

    def status(self) -> dict[str, object]:
        """The private status route's answer."""
        response = self.client.get("/mta/v1/status")
        response.raise_for_status()
        answer: dict[str, object] = response.json()
        return answer

    def prompt_logprobs(self, model: str, token_ids: list[int]) -> list[float]:
        """Log-probability of each prompt token given those before it, from the second token on."""
        body = {"model": model, "prompt": token_ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        response = self.client.post("/v1/completions", json=body)
        response.raise_for_status()
        entries = response.json()["choices"][0]["prompt_logprobs"][1:]
        return [entry[str(token)]["logprob"] for entry, token in zip(entries, token_ids[1:], strict=True)]


def free_port() -> int:
    """A TCP port on loopback that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_engine(bank: Path, model: Path, log: Path, **settings: object) -> Iterator[Engine]:
    """Start an engine, wait until it serves, and end its whole process group afterwards.

    Args:
        bank: its bank.
        model: its base model.
        log: file for its output, shown when it does not start.
        settings: further settings by name, e.g. `max_loras=2`.
    """
    port = free_port()
    given = {"bank": bank, "model": model, "engine_port": port, "engine_key": KEY, "max_num_seqs": 16, **settings}
    environment = dict(os.environ) | {f"MTA_{name.upper()}": str(value) for name, value in given.items()}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "server.cli", "engine"],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_healthy(process, url, log)
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=120) as client:
            yield Engine(url, process.pid, client)
    finally:
        _end_group(process)


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Poll `/health` until it answers 200."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK:
                return
        time.sleep(0.5)
    tail = log.read_text(errors="replace")[-4000:]
    raise RuntimeError(f"the engine did not start (exit status {process.poll()}):\n{tail}")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the group, SIGKILL to what is left of it."""
    for sign, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 10)):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience_s)
            break
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
