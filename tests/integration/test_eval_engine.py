"""Evaluating through a real vLLM gives what evaluating in process gives, user adapters included."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from adapters.errors import MtaError
from adapters.recipe import FusionRecipe, Term
from adapters.training.example import Example
from bank.evaluation.scoring import EvalAdapter, ModelReader, OpenBank, Scorer
from bank.items.prompt import encode_pair
from bank.lookup.embedder import Embedder
from bank.models.load import load_base
from bench.rig.engine import KEY, running_engine
from bench.rig.tiny import tiny_bank
from bench.rig.user_adapters import random_user_adapter
from bench.rig.valkey import ValkeyProcess
from server.cli.eval.engine import EngineReader, open_engine_reader
from server.settings import Settings

TURNS = ("Say 1", "Say something about trains", "And?")


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, embedder_folder: Path) -> OpenBank:
    folder = tiny_bank(tmp_path_factory.mktemp("bank"), tiny_model_folder, embedder_folder, scale=0.1)
    return OpenBank.open(folder, Embedder.load(embedder_folder).id)


@pytest.fixture(scope="module")
def scorer(tiny_model_folder: Path) -> Scorer:
    return Scorer(*load_base(tiny_model_folder, "float32"))


@pytest.fixture(scope="module")
def engine(bank: OpenBank, tiny_model_folder: Path, valkey: ValkeyProcess) -> Iterator[EngineReader]:
    with (
        running_engine(bank.folder, tiny_model_folder, dtype="float32", redis_url=valkey.url) as running,
        open_engine_reader(running.url, Settings(redis_url=valkey.url, engine_key=SecretStr(KEY))) as reader,
    ):
        yield reader


@pytest.fixture(scope="module")
def examples(scorer: Scorer) -> list[Example]:
    return [encode_pair(scorer.tokenizer, turn, f"{turn} indeed", 128) for turn in TURNS]


def test_results_are_those_in_process(
    bank: OpenBank, scorer: Scorer, engine: EngineReader, examples: list[Example]
) -> None:
    recipe = FusionRecipe(bank.manifest.short, bank.manifest.method, True, (Term(0, 400), Term(3, 300)))
    merged, stacked = (
        EvalAdapter(bank, recipe, trained) for trained in (None, random_user_adapter(bank.manifest, recipe).weights)
    )

    def answers(reader: ModelReader, adapter: EvalAdapter | None) -> list[str]:
        """But for a last character that is cut in the middle: vLLM leaves it out, transformers marks it."""
        return [(reading.answer or "").rstrip("\ufffd").strip() for reading in reader.read(adapter, examples, 8)]

    losses = set()
    for adapter in (None, merged, stacked):
        found = engine.read(adapter, examples)
        expected = [reading.loss for reading in scorer.read(adapter, examples)]
        assert [reading.loss for reading in found] == pytest.approx(expected, abs=1e-3)
        assert all(reading.answer is None for reading in found)
        assert answers(engine, adapter) == answers(scorer, adapter)
        losses.add(round(found[0].loss, 3))
    assert len(losses) == 3
    for reader in (scorer, engine):
        written = reader.write(merged, examples, 3)
        assert [len(set(texts)) for texts in written] == [3] * len(TURNS)
        assert written == reader.write(merged, examples, 3)


def test_a_bank_that_is_not_served_is_named(bank: OpenBank, engine: EngineReader, examples: list[Example]) -> None:
    elsewhere = EvalAdapter(bank, FusionRecipe("ffffffff", bank.manifest.method, True, ()))
    with pytest.raises(MtaError, match=r"ffffffff.*MTA_NEXT_BANK"):
        engine.read(elsewhere, examples)
