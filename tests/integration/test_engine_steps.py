"""From a name that nobody has asked for to a slot, in a real vLLM: done once, measured where it happens, right in
steps that mix requests with and without an adapter."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from bench.rig.engine import Engine, running_engine
from bench.rig.tiny import tiny_bank, tiny_model
from tests.support.engine import text_of

SLOTS = 2
KINDS = ("check", "fuse", "slot_write", "bring_in", "load")
COUNTS = ("fuses", "slot_evictions", "shared_slots")
NOISE = 1e-4  # float32, in batches of other sizes; an adapter moves log-probabilities by more than a hundred times that
PROMPTS = ["Write a line about the sea.", "two\nlines", "A much longer question, to cross a block boundary. " * 3]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a context long enough for answers that outlive all that is asked beside them."""
    return tiny_model(tmp_path_factory.mktemp("model"), context=2048)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, model: Path, embedder_folder: Path) -> Path:
    return tiny_bank(tmp_path_factory.mktemp("bank"), model, embedder_folder, anchors=40, scale=0.2)


@pytest.fixture(scope="module")
def engine(bank: Path, model: Path) -> Iterator[Engine]:
    with running_engine(bank, model, dtype="float32", max_loras=SLOTS) as engine:
        yield engine


def counted(engine: Engine) -> dict[str, float]:
    """How often each thing has happened."""
    durations = {kind: engine.metric(f"mta_engine_{kind}_seconds_count") for kind in KINDS}
    return durations | {count: engine.metric(f"mta_engine_{count}_total") for count in COUNTS}


def grown(engine: Engine, before: dict[str, float]) -> dict[str, float]:
    """What has happened since."""
    return {name: value - before[name] for name, value in counted(engine).items() if value != before[name]}


def test_a_new_recipe_is_fused_and_written_once_and_each_part_is_timed(engine: Engine, prefix: str) -> None:
    before, recipe = counted(engine), f"{prefix}:c+a01*500"
    text_of(engine.chat(recipe))
    assert grown(engine, before) == {"check": 1, "fuse": 1, "fuses": 1, "slot_write": 1, "bring_in": 1}
    text_of(engine.chat(recipe))
    text_of(engine.chat("base"))
    assert grown(engine, before) == {"check": 2, "fuse": 1, "fuses": 1, "slot_write": 1, "bring_in": 1}
    for kind in KINDS:
        assert 0 <= engine.metric(f"mta_engine_{kind}_seconds_sum") < 600


def test_many_new_recipes_at_once_through_few_slots_are_all_answered_as_alone(engine: Engine, prefix: str) -> None:
    recipes = [f"{prefix}:c+a{i:02d}*600" for i in range(10, 30)]
    before = counted(engine)
    with ThreadPoolExecutor(len(recipes)) as pool:
        together = [text_of(answer) for answer in pool.map(lambda name: engine.chat(name, max_tokens=2), recipes)]
    assert grown(engine, before)["fuses"] == len(recipes)
    assert together == [text_of(engine.chat(name, max_tokens=2)) for name in recipes]
    assert len(set(together)) > 1


class Answer(NamedTuple):
    """A greedy answer and the log-probabilities of prompt and answer, in float32."""

    text: str
    logprobs: torch.Tensor


def answer(engine: Engine, model: str, prompt: str) -> Answer:
    """Prefill and decode, every log-probability seen."""
    greedy = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0}
    response = engine.client.post("/v1/completions", json={"model": model, "prompt": prompt} | greedy)
    response.raise_for_status()
    choice = response.json()["choices"][0]
    of_prompt = [next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"][1:]]
    return Answer(choice["text"], torch.tensor(of_prompt + choice["logprobs"]["token_logprobs"]))


def furthest(one: Answer, other: Answer) -> float:
    """The largest difference between two answers' log-probabilities."""
    return float((one.logprobs - other.logprobs).abs().max())


@pytest.mark.parametrize("streams", [1, SLOTS])
def test_every_answer_of_a_mixed_step_is_what_it_is_alone(engine: Engine, prefix: str, streams: int) -> None:
    recipes = [f"{prefix}:c+a{i:02d}*900" for i in range(SLOTS + 1)]  # one more than there are slots
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
