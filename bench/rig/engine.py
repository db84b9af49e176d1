"""A real vLLM with the plugin, started like `mta engine`, for the duration of a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from bench.rig.client import summed
from bench.rig.processes import answers, mta, running, wait_until
from server.supervisor.services import free_port

KEY = "test-engine-key"
START_TIMEOUT_S = 180


@dataclass(frozen=True, slots=True)
class Engine:
    """A running engine."""

    url: str  # its HTTP address
    pid: int  # of the API process
    client: httpx.Client  # an HTTP client that carries its key

    def chat(self, model: str, text: str = "hello there", **options: object) -> httpx.Response:
        """Request one greedy chat completion, by default of 8 tokens."""
        body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 8, "temperature": 0}
        return self.client.post("/v1/chat/completions", json=body | options)

    @contextmanager
    def long_answer(self, model: str, tokens: int = 400) -> Iterator[Iterator[str]]:
        """Yield the lines of a streamed answer once the request is admitted."""
        messages = [{"role": "user", "content": "x"}]
        body = {"model": model, "messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": True}
        with self.client.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            yield response.iter_lines()

    def status(self) -> dict[str, Any]:
        """Return the answer of the private status route."""
        answer: dict[str, Any] = self.client.get("/mta/v1/status").raise_for_status().json()
        return answer

    def resident(self) -> dict[str, list[str]]:
        """Return what the workers hold: `resident` recipes, and recipes whose user adapter is `held`."""
        answer: dict[str, list[str]] = self.client.get("/mta/v1/resident").raise_for_status().json()
        return answer

    def metric(self, name: str) -> float:
        """Return the sum of a metric over all labels."""
        return summed(self.client.get("/metrics").text, name)

    def prompt_logprobs(self, model: str, token_ids: list[int]) -> list[float]:
        """Return the log-probability of each prompt token given those before it, from the second token on."""
        body = {"model": model, "prompt": token_ids, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        response = self.client.post("/v1/completions", json=body)
        response.raise_for_status()
        entries = response.json()["choices"][0]["prompt_logprobs"][1:]
        return [entry[str(token)]["logprob"] for entry, token in zip(entries, token_ids[1:], strict=True)]


def client_of(url: str, timeout_s: float = 120) -> httpx.Client:
    """Return a client of an engine whose key is `KEY`; it drops idle connections before any vLLM does."""
    limits = httpx.Limits(keepalive_expiry=2)
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}, timeout=timeout_s, limits=limits)


@contextmanager
def running_engine(bank: Path, model: Path, **settings: object) -> Iterator[Engine]:
    """Start an engine, wait until it serves, and stop all its processes afterwards."""
    port = free_port()
    given = {"bank": bank, "model": model, "engine_port": port, "engine_key": KEY, "max_num_seqs": 16, **settings}
    with served(mta("engine"), {f"MTA_{name.upper()}": str(value) for name, value in given.items()}, port) as engine:
        yield engine


@contextmanager
def served(command: Sequence[str], environment: Mapping[str, str], port: int) -> Iterator[Engine]:
    """Start any vLLM server by its command and wait until it answers `/health`; its key is `KEY`."""
    url = f"http://127.0.0.1:{port}"
    with (
        running(command, environment) as background,
        client_of(url) as client,
    ):

        def healthy() -> bool:
            code = background.process.poll()
            assert code is None, f"the engine ended with status {code}:\n{background.output[-4000:]}"
            return answers(f"{url}/health")

        wait_until(healthy, "the engine to serve", START_TIMEOUT_S)
        yield Engine(url, background.process.pid, client)
