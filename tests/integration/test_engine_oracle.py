"""A real vLLM in float32: its answers are those of dense formulas, alone and in mixed steps; recipes are fused once."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import torch
from transformers import AutoModelForCausalLM

from adapters.recipe import FusionMethod, FusionRecipe, Term, UserAdapterId
from adapters.user_adapter import UserAdapter
from bank.manifest import BankManifest, read_manifest
from bank.matrix import open_matrix
from bench.rig.engine import Engine, running_engine
from bench.rig.processes import descendants, paused, wait_until
from bench.rig.tiny import tiny_bank
from bench.rig.valkey import ValkeyProcess
from tests.support.dense import dense_adapter, token_logprobs
from tests.support.gateway import content_of
from tests.support.user_adapters import keep_user_adapter, random_user_adapter

SLOTS = 2
TOLERANCE = 1e-3
NOISE = 1e-4  # in batches of other sizes; an adapter moves log-probabilities by more than a hundred times that
PROMPTS = ["Write a line about the sea.", "two\nlines", "A much longer question, to cross a block boundary. " * 3]
CASES: list[tuple[bool, tuple[Term, ...]]] = [
    (False, (Term(2, 1000),)),
    (False, (Term(0, 571), Term(3, 429))),
    (True, ()),
    (True, (Term(1, 300), Term(2, 200))),
    (True, (Term(0, 100), Term(3, 900))),
]
KINDS = ("check", "fuse", "slot_write", "bring_in", "load")
COUNTS = ("fuses", "slot_evictions", "shared_slots")
TURNS = ("Say 1", "Say something about trains", "And?")
USER = "a" * 25 + "e"


@pytest.fixture(scope="module")
def dense(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory, model: Path, embedder_folder: Path, bank: Path) -> list[Path]:
    """Of other methods, modules and rows: an engine serves two of them while a fleet moves."""
    targets = ["q_proj", "k_proj", "up_proj", "down_proj"]
    folder, method = tmp_path_factory.mktemp("other"), FusionMethod.CAT
    cat = tiny_bank(folder, model, embedder_folder, method=method, scale=0.1, targets=targets)
    made = {"anchors": 8, "directions": 5, "scale": 0.1}
    return [bank, cat, tiny_bank(tmp_path_factory.mktemp("directions"), model, embedder_folder, **made)]


@pytest.fixture(scope="module")
def engine(banks: list[Path], model: Path, valkey: ValkeyProcess) -> Iterator[Engine]:
    settings = {"dtype": "float32", "max_loras": SLOTS, "redis_url": valkey.url}
    with running_engine(banks[0], model, next_bank=banks[1], **settings) as engine:
        yield engine


def tokens_of(engine: Engine, prompt: str) -> list[int]:
    ids: list[int] = engine.client.post("/tokenize", json={"model": "base", "prompt": prompt}).json()["tokens"]
    return ids


@pytest.mark.parametrize("ranks", [1, 2])
def test_engine_and_dense_model_give_the_same_log_probabilities(
    request: pytest.FixtureRequest, banks: list[Path], model: Path, dense: Any, ranks: int
) -> None:
    served = banks[:2] if ranks == 1 else banks[1:]
    with ExitStack() as stack:
        if ranks == 1:
            engine, prompts, cases = request.getfixturevalue("engine"), PROMPTS, CASES
        else:  # with one slot, every recipe is written over the one before it
            settings = {"dtype": "float32", "max_loras": 1, "tensor_parallel_size": ranks}
            engine = stack.enter_context(running_engine(served[0], model, next_bank=served[1], **settings))
            prompts, cases = PROMPTS[:1], CASES[::4]  # ranks that share two busy cores are slow
        tokens = [tokens_of(engine, prompt) for prompt in prompts]
        plain = torch.tensor(engine.prompt_logprobs("base", tokens[0]))
        torch.testing.assert_close(plain, token_logprobs(dense, tokens[0]), atol=TOLERANCE, rtol=0)
        for bank in reversed(served):
            manifest = read_manifest(bank)
            matrix = open_matrix(bank, manifest)
            recipes = [FusionRecipe(manifest.short, manifest.method, common, terms) for common, terms in cases]
            if manifest.directions:
                steps = ((16, -9, 0, 127, -40), (0, 0, 3, 0, 8))
                recipes = [FusionRecipe(manifest.short, manifest.method, True, (), steps=each) for each in steps]
            for recipe in recipes:
                with dense_adapter(dense, matrix, recipe):
                    wanted = [token_logprobs(dense, ids) for ids in tokens]
                for ids, expected in zip(tokens, wanted, strict=True):
                    served = torch.tensor(engine.prompt_logprobs(recipe.name, ids))
                    torch.testing.assert_close(
                        served, expected, atol=TOLERANCE, rtol=0, msg=lambda m, r=recipe: f"{r.name}: {m}"
                    )
                assert (wanted[0] - plain).abs().max() > 10 * TOLERANCE, f"{recipe.name} changes nothing"


def counted(engine: Engine) -> dict[str, float]:
    durations = {kind: engine.metric(f"mta_engine_{kind}_seconds_count") for kind in KINDS}
    return durations | {count: engine.metric(f"mta_engine_{count}_total") for count in COUNTS}


def grown(engine: Engine, before: dict[str, float]) -> dict[str, float]:
    return {name: value - before[name] for name, value in counted(engine).items() if value != before[name]}


def test_new_recipe_is_fused_and_written_once_and_counted(engine: Engine, prefix: str) -> None:
    names = [f"{prefix}:c+a{i:02d}*500" for i in range(SLOTS + 1)]
    for name in names[1:]:
        content_of(engine.chat(name))
    before = counted(engine)
    once = {"check": 1, "fuse": 1, "fuses": 1, "slot_write": 1, "bring_in": 1, "slot_evictions": 1}
    content_of(engine.chat(names[0]))
    assert grown(engine, before) == once
    content_of(engine.chat(names[0]))
    content_of(engine.chat("base"))
    assert grown(engine, before) == once | {"check": 2}


def test_many_new_recipes_through_few_slots_answer_as_alone(engine: Engine, prefix: str) -> None:
    recipes = [f"{prefix}:c+a{i:02d}*600" for i in range(10, 30)]
    before = counted(engine)
    with ThreadPoolExecutor(len(recipes)) as pool:
        together = [content_of(answer) for answer in pool.map(lambda name: engine.chat(name, max_tokens=2), recipes)]
    assert grown(engine, before)["fuses"] == len(recipes)
    assert together == [content_of(engine.chat(name, max_tokens=2)) for name in recipes]
    assert len(set(together)) > 1


def answer(engine: Engine, model: str, prompt: str) -> tuple[str, torch.Tensor]:
    greedy = {"max_tokens": 24, "temperature": 0, "ignore_eos": True, "logprobs": 0, "prompt_logprobs": 0}
    response = engine.client.post("/v1/completions", json={"model": model, "prompt": prompt} | greedy)
    response.raise_for_status()
    choice = response.json()["choices"][0]
    of_prompt = [next(iter(entry.values()))["logprob"] for entry in choice["prompt_logprobs"][1:]]
    return choice["text"], torch.tensor(of_prompt + choice["logprobs"]["token_logprobs"])


@pytest.mark.parametrize("streams", [1, SLOTS])
def test_every_answer_of_a_mixed_step_is_what_it_is_alone(engine: Engine, prefix: str, streams: int) -> None:
    recipes = [f"{prefix}:c+a{i:02d}*900" for i in range(SLOTS + 1)]  # one more than there are slots
    asked = [(name, prompt) for name in ("base", recipes[0]) for prompt in PROMPTS]
    alone = [answer(engine, *request) for request in asked]
    for (_, base), (_, own) in zip(alone[:3], alone[3:], strict=True):
        assert (base - own).abs().max() > 100 * NOISE
    for recipe in reversed(recipes):  # every slot holds somebody's adapter, and who was first is out again
        engine.chat(recipe).raise_for_status()
    with ExitStack() as stack, ThreadPoolExecutor(len(asked)) as pool:
        beside = [stack.enter_context(engine.long_answer(recipe, 2000)) for recipe in recipes[:streams]]
        assert all(next(lines).startswith("data: {") for lines in beside)
        mixed = list(pool.map(lambda request: answer(engine, *request), asked))
        assert engine.metric("vllm:num_requests_running") == streams, "the long answers ended before the others"
    for request, (text, logprobs), (mixed_text, others) in zip(asked, alone, mixed, strict=True):
        assert (logprobs - others).abs().max() < NOISE, f"{request[0]} is not itself beside others"
        assert text == mixed_text


@dataclass(frozen=True, slots=True)
class Stacked:
    """An engine, one of its banks, and the Redis that it fetches user adapters from."""

    engine: Engine
    bank: Path
    manifest: BankManifest
    redis_url: str

    def keep(self) -> tuple[FusionRecipe, UserAdapter]:
        terms, adapter = (Term(0, 400), Term(3, 300)), UserAdapterId(USER, "b" * 25 + "e")
        recipe = FusionRecipe(self.manifest.short, self.manifest.method, True, terms, adapter)
        user = random_user_adapter(self.manifest, recipe)
        keep_user_adapter(self.redis_url, recipe, user, self.manifest)
        return recipe, user

    def drop(self) -> int:
        return int(self.engine.client.post("/mta/v1/drop", json={"user_key": USER}).json()["held"])

    def forget(self) -> None:
        with redis.Redis.from_url(self.redis_url) as client:
            client.delete(f"mta:{{{USER}}}:adapter")
        assert self.drop() == 0


@pytest.fixture(params=[0, 1], ids=["shared", "cat"])
def stacked(
    request: pytest.FixtureRequest, engine: Engine, banks: list[Path], valkey: ValkeyProcess
) -> Iterator[Stacked]:
    """With no user adapter anywhere."""
    bank = banks[request.param]
    stacked = Stacked(engine, bank, read_manifest(bank), valkey.url)
    stacked.forget()
    yield stacked
    stacked.forget()


def test_stacked_answer_is_the_dense_sum_after_slot_reuse(stacked: Stacked, dense: Any) -> None:
    """Its weights are kept meanwhile: whatever were done to them in place would be done each time."""
    (recipe, user), engine = stacked.keep(), stacked.engine
    ids = tokens_of(engine, PROMPTS[0])
    names = (recipe.name, recipe.plain.name, FusionRecipe(recipe.bank, recipe.method, True, ()).name)
    assert len(names) > SLOTS
    first = {name: engine.prompt_logprobs(name, ids) for name in names}
    with dense_adapter(dense, open_matrix(stacked.bank, stacked.manifest), recipe, user):
        wanted = token_logprobs(dense, ids)
    torch.testing.assert_close(torch.tensor(first[recipe.name]), wanted, atol=TOLERANCE, rtol=0)
    assert (torch.tensor(first[recipe.plain.name]) - wanted).abs().max() > 10 * TOLERANCE
    before = counted(engine)
    for _ in range(4):
        assert {name: engine.prompt_logprobs(name, ids) for name in names} == first
    times = 4 * len(names)
    assert grown(engine, before) == dict.fromkeys(("check", "slot_write", "bring_in", "slot_evictions"), times)


def test_dropped_user_is_released_once_the_open_stream_ends(stacked: Stacked) -> None:
    (recipe, _), engine = stacked.keep(), stacked.engine
    content_of(engine.chat(recipe.name))
    with ExitStack() as open_stream:
        with paused(*descendants(engine.pid)):  # the model, so that the answer cannot end before
            lines = open_stream.enter_context(engine.long_answer(recipe.name))
            assert stacked.drop() == 1
        assert [line for line in lines if line][-1] == "data: [DONE]"
    there = engine.resident()
    assert (recipe.name in there["resident"], there["held"], engine.status()["user_adapters"]) == (
        True,
        [recipe.name],
        1,
    )
    wait_until(lambda: stacked.drop() == 0, "the request to be over")  # its last line is out a little before
    there = engine.resident()
    assert (recipe.name in there["resident"], there["held"], engine.status()["user_adapters"]) == (False, [], 0)
