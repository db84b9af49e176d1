"""Steps that mix requests with and without an adapter, in a real vLLM: each answer is what it is alone."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bank.manifest import read_manifest
from bench.rig.engine import Engine, running_engine
from bench.rig.tiny import tiny_bank, tiny_model

SLOTS = 2
NOISE = 1e-4  # float32, in batches of other sizes; an adapter moves log-probabilities by more than a hundred times that
PROMPTS = ["Write a line about the sea.", "two\nlines", "A much longer question, to cross a block boundary. " * 3]


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer and the log-probabilities of prompt and answer, in float32."""

    text: str
    logprobs: torch.Tensor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a context long enough for answers that outlive all that is asked beside them."""
    return tiny_model(tmp_path_factory.mktemp("model"), context=2048)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, model: Path, embedder_folder: Path) -> Path:
    return tiny_bank(tmp_path_factory.mktemp("bank"), model, embedder_folder, scale=0.2)


@pytest.fixture(scope="module")
def engine(bank: Path, model: Path) -> Iterator[Engine]:
    with running_engine(bank, model, dtype="float32", max_loras=SLOTS) as engine:
        yield engine


@pytest.fixture(scope="module")
def recipes(bank: Path) -> list[str]:
    """One more than there are slots."""
    return [f"mta1:{read_manifest(bank).short}:shared:c+a{i:02d}*900" for i in range(SLOTS + 1)]


def answer(engine: Engine, model: str, prompt: str) -> Answer:
    """Prefill and decode, every log-probability seen."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": 24,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 0,
        "prompt_logprobs": 0,
    }
    response = engine.client.post("/v1/completions", json=body)
    response.raise_for_status()
    choice = response.json()["choices"][0]
    of_prompt = [next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"][1:]]
    return Answer(choice["text"], torch.tensor(of_prompt + choice["logprobs"]["token_logprobs"]))


def furthest(one: Answer, other: Answer) -> float:
    """The largest difference between two answers' log-probabilities."""
    return float((one.logprobs - other.logprobs).abs().max())


@pytest.mark.parametrize("streams", [1, SLOTS])
def test_every_answer_of_a_mixed_step_is_what_it_is_alone(engine: Engine, recipes: list[str], streams: int) -> None:
    asked = [(name, prompt) for name in ("base", recipes[0]) for prompt in PROMPTS]
    alone = [answer(engine, *request) for request in asked]
    assert min(furthest(base, own) for base, own in zip(alone[:3], alone[3:], strict=True)) > 100 * NOISE
    for recipe in reversed(recipes):  # every slot holds somebody's adapter, and who was first is out again
        engine.chat(recipe).raise_for_status()
    with ExitStack() as stack, ThreadPoolExecutor(len(asked)) as pool:
        for recipe in recipes[:streams]:
            stack.enter_context(long_answer(engine, recipe))
        mixed = list(pool.map(lambda request: answer(engine, *request), asked))
        assert engine.metric("vllm:num_requests_running") == streams, "the long answers ended before the others"
    for request, one, other in zip(asked, alone, mixed, strict=True):
        assert furthest(one, other) < NOISE, f"{request[0]} is not itself beside others"
        assert one.text == other.text


@contextmanager
def long_answer(engine: Engine, recipe: str) -> Iterator[None]:
    """An answer that has begun and goes on until the block ends."""
    body = {"model": recipe, "prompt": "x", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with engine.client.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: httpx hangs up when the iterator goes
        assert next(lines).startswith("data: {")
        yield
