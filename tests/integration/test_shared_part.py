"""A real vLLM whose users share how prompts begin: it is read once, with the common row, and nothing else is shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from adapters.matrix import MetaMatrix
from adapters.recipe import FusionRecipe, Term
from adapters.training.example import Acts
from bank.items.prompt import encode_conversation
from bank.lookup.embedder import Embedder
from bank.manifest import BankManifest, read_manifest
from bank.matrix import open_matrix
from bench.rig.engine import KEY, START_TIMEOUT_S, Engine
from bench.rig.engine import served as serving
from bench.rig.processes import PATIENCE_S, running
from bench.rig.servers import vllm_command
from bench.rig.subject import Subject
from bench.rig.tiny import tiny_bank
from evaluation.scoring import EvalAdapter, OpenBank, Scorer
from server.cli import app
from server.supervisor.services import free_port
from tests.support.dense import token_logprobs, two_part_logprobs
from tests.support.rigged import RIGS, ROUTE

SLOTS = 2
WHOLE = 256  # tokens of the blocks that the system prompt fills
TOLERANCE = 1e-3
SYSTEM = "Answer in one line, politely. " * 9
TURNS = ("Where is the sea?", "And why?", "Who are you, and what do you want from me?")


class Served:
    """An engine, and the dense model beside it."""

    def __init__(self, acts: Acts, bank: Path, model: Path, engine: Engine) -> None:
        self.acts, self.bank, self.model, self.engine, self.found = acts, bank, model, engine, 0
        self.manifest: BankManifest = read_manifest(bank)
        self.matrix: MetaMatrix = open_matrix(bank, self.manifest)
        self.dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def recipe(self, anchor: int, weight: int = 900) -> FusionRecipe:
        return FusionRecipe(self.manifest.short, self.manifest.method, True, (Term(anchor, weight),))

    def messages(self, turn: str, system: str = SYSTEM) -> list[dict[str, str]]:
        return [{"role": "system", "content": system}, {"role": "user", "content": turn}]

    def ask(self, model: str, messages: list[dict[str, str]], **options: object) -> dict[str, Any]:
        body = {"messages": messages, "max_tokens": 6, "logprobs": True, "return_token_ids": True} | options
        response = self.engine.chat(model, **body)
        response.raise_for_status()
        answer: dict[str, Any] = response.json()
        return answer

    @contextmanager
    def rigged(self, how: str) -> Iterator[str]:
        """Yield why the engine would not be ready, were it rigged from the start."""
        yield self._rig(how)
        assert self._rig("") == ""

    def _rig(self, how: str) -> str:
        answer = self.engine.client.post(ROUTE, json={"rig": how}).raise_for_status()
        return str(answer.json()["error"])

    def cached(self) -> int:
        """Tokens found in the prefix cache, since the last call."""
        before, self.found = self.found, int(self.engine.metric("vllm:prefix_cache_hits_total"))
        return self.found - before

    def check(self, recipe: FusionRecipe, messages: list[dict[str, str]], answer: dict[str, Any]) -> None:
        """The answers' log-probabilities are those of the two parts, as training reads them."""
        prompt = answer["prompt_token_ids"]
        shared = encode_conversation(self.tokenizer, messages, "yes").personal_from(self.acts)
        assert WHOLE < shared < len(prompt)
        for choice in answer["choices"]:
            ids = [*prompt, *choice["token_ids"]]
            wanted = two_part_logprobs(self.dense, self.matrix, (self.manifest.common_recipe, recipe), ids, shared)
            found = torch.tensor([token["logprob"] for token in choice["logprobs"]["content"]])
            own = wanted[len(prompt) - 1 :]
            torch.testing.assert_close(found, own, atol=TOLERANCE, rtol=0)
            assert (own - token_logprobs(self.dense, ids)[len(prompt) - 1 :]).abs().max() > 10 * TOLERANCE
            if read := answer.get("prompt_logprobs"):
                of_prompt = [entry[str(token)]["logprob"] for entry, token in zip(read[1:], prompt[1:], strict=True)]
                torch.testing.assert_close(torch.tensor(of_prompt), wanted[: len(prompt) - 1], atol=TOLERANCE, rtol=0)


def rigged(subject: Subject, rig: Path, **settings: object) -> tuple[list[str], dict[str, str], int]:
    """Command, environment and port of an engine that a file rigs."""
    port = free_port()
    argv, environment = vllm_command(subject, "ours", port, **settings)
    argv[2:3] = "tests.support.rigged", str(rig)
    return argv, environment, port


WAYS = [(Acts.AFTER_SYSTEM, 128), (Acts.ANSWER, 32)]
one_way = pytest.mark.parametrize("served", WAYS[:1], indirect=True, ids=str)


@pytest.fixture(scope="module", params=WAYS, ids=str)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model: Path, embedder_folder: Path
) -> Iterator[Served]:
    """With large blocks, or with small ones and prompts that take several steps."""
    acts, block = request.param
    folder = tmp_path_factory.mktemp("shared")
    bank, rig = tiny_bank(folder / "bank", model, embedder_folder, acts=acts, scale=0.1, canary=True), folder / "rig"
    rig.touch()
    subject = Subject(bank, model, read_manifest(bank))
    arguments = ("--block-size", str(block), "--max-num-batched-tokens", "512" if block == 128 else "80")
    settings = {"dtype": "float32", "max_loras": SLOTS, "max_model_len": 512}
    argv, environment, port = rigged(subject, rig, **settings)
    with serving([*argv, *arguments], environment, port) as engine:
        yield Served(acts, bank, model, engine)


def test_a_system_prompt_is_read_once_for_all_users(served: Served) -> None:
    served.cached()
    for place, turn in enumerate(TURNS):
        served.ask(served.recipe(place).name, served.messages(turn, SYSTEM.lower()))
        assert served.cached() == (WHOLE if place else 0)


def test_answers_are_those_of_the_two_parts(served: Served) -> None:
    for place, turn in enumerate(TURNS):
        recipe, messages = served.recipe(place), served.messages(turn)
        served.check(recipe, messages, served.ask(recipe.name, messages))


def test_many_users_in_one_step_read_their_own_parts(served: Served) -> None:
    recipes = [served.recipe(anchor, weight) for anchor in range(4) for weight in (-800, 700)]
    asked = [served.messages(f"{turn} {place}") for place, turn in enumerate(TURNS * 3)][: len(recipes)]
    with ThreadPoolExecutor(len(recipes)) as pool:
        answers = list(pool.map(lambda recipe, messages: served.ask(recipe.name, messages), recipes, asked))
    for recipe, messages, answer in zip(recipes, asked, answers, strict=True):
        served.check(recipe, messages, answer)


@pytest.mark.parametrize(
    ("anchor", "options"),
    [(1, {"prompt_logprobs": 0}), (2, {"n": 3, "temperature": 1, "seed": 1}), (None, {})],
    ids=["prompt", "several answers", "the common recipe"],
)
def test_other_ways_of_asking_are_read_alike(served: Served, anchor: int | None, options: dict[str, object]) -> None:
    recipe = served.manifest.common_recipe if anchor is None else served.recipe(anchor)
    messages = served.messages("How many?")
    served.check(recipe, messages, served.ask(recipe.name, messages, **options))


def test_evaluation_writes_what_the_engine_writes(served: Served, embedder_folder: Path) -> None:
    bank, scorer = OpenBank.open(served.bank, Embedder.load(embedder_folder).id), Scorer(served.dense, served.tokenizer)
    asked, recipe = [served.messages(turn) for turn in TURNS], served.recipe(2)
    examples = [encode_conversation(served.tokenizer, messages, "yes") for messages in asked]
    readings = scorer.read(EvalAdapter(bank, recipe), examples, 6)
    answers = [served.ask(recipe.name, messages)["choices"][0]["message"]["content"] for messages in asked]
    scorer.bare()
    assert [reading.answer for reading in readings] == [answer.strip() for answer in answers]


def test_an_earlier_answer_is_read_as_training_reads_it(served: Served) -> None:
    recipe, messages = served.recipe(3), served.messages("Why?")
    said = served.ask(recipe.name, messages)["choices"][0]["message"]["content"]
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And then?"}]
    served.check(recipe, messages, served.ask(recipe.name, messages))


def test_the_base_model_and_other_tenants_read_for_themselves(served: Served) -> None:
    messages = served.messages("Which way?", SYSTEM.upper())
    served.cached()
    served.ask(served.recipe(0).name, messages)
    base = served.ask("base", messages)
    assert served.cached() == 0
    whole = [*base["prompt_token_ids"], *base["choices"][0]["token_ids"]]
    found = torch.tensor([token["logprob"] for token in base["choices"][0]["logprobs"]["content"]])
    alone = token_logprobs(served.dense, whole)[len(base["prompt_token_ids"]) - 1 :]
    torch.testing.assert_close(found, alone, atol=TOLERANCE, rtol=0)
    served.ask(served.recipe(1).name, messages, cache_salt="another tenant")
    assert served.cached() == 0
    served.ask(served.recipe(1).name, messages)
    assert served.cached() == WHOLE


@pytest.fixture
def verify(served: Served, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The command, for this engine."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as the command does, but for this test alone
    monkeypatch.setenv("MTA_ENGINE_KEY", KEY)
    where = ("--bank", str(served.bank), "--model", str(served.model), "--engine-url", served.engine.url)
    return lambda *options: CliRunner().invoke(app, ["verify", *where, *options])


def test_serving_is_found_to_equal_training(verify: Callable[..., Result]) -> None:
    done = verify()
    assert done.exit_code == 0, done.output
    assert done.stdout.count(" effect 1.000\n") == 4 * 5


@one_way
@pytest.mark.parametrize("rig", RIGS)
def test_a_rigged_engine_is_caught(served: Served, verify: Callable[..., Result], tmp_path: Path, rig: str) -> None:
    (tmp_path / "texts").write_text("The sea is wide today, and the boats are out.\n")
    with served.rigged(rig) as refusal:
        done = verify("--texts", str(tmp_path / "texts"))
    assert done.exit_code == 1, done.output
    wrong = [line.split(":")[0] for line in done.stdout.splitlines() if line.endswith("NOT AS IN TRAINING")]
    assert wrong[:2] == ["text 1, c+a00*900+a03*-700", "text 1, c+a00*300+a03*200"]
    assert refusal.startswith("adapters do not act as in training: with c+a00*900+a03*-700 of bank")


@one_way
def test_an_engine_that_is_rigged_from_the_start_is_never_ready(served: Served, tmp_path: Path) -> None:
    (tmp_path / "rig").write_text(RIGS[1])
    subject = Subject(served.bank, served.model, served.manifest)
    argv, environment, _ = rigged(subject, tmp_path / "rig", dtype="float32", max_model_len=512)
    with running(argv, environment) as engine:
        engine.wait_for(r"BankError: adapters do not act as in training", START_TIMEOUT_S)
        assert engine.process.wait(PATIENCE_S) != 0


@one_way
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--bank", "tests/earlier/bank"), "an engine does not serve the bank at tests/earlier/bank"),
        (("--engine-url", "http://127.0.0.1:1"), "the engine at http://127.0.0.1:1 gives no /mta/v1/status: "),
        (("--texts", "nowhere.txt"), "No such file or directory: 'nowhere.txt'"),
        (("--texts", "/dev/null"), "there is nothing to read: /dev/null is empty"),
    ],
    ids=["another bank", "no engine", "no file", "no texts"],
)
def test_verify_that_cannot_be_run_says_why_and_ends_with_two(
    verify: Callable[..., Result], options: tuple[str, ...], reason: str
) -> None:
    done = verify(*options)
    assert (done.exit_code, done.stdout) == (2, "")
    assert reason in done.stderr
