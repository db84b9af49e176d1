"""Signatures on a tiny model: what they predict is what happens, and they tell manners apart where topics cannot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.fusion import fuse
from adapters.matrix import MetaMatrix
from adapters.recipe import PER_MILLE, FusionRecipe, Term
from adapters.training.attached import attached
from adapters.training.example import Acts, Example
from adapters.training.loss import mean_loss
from bank.building.signer import Signer
from bank.items.prompt import encode_pair
from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.manifest import BankManifest
from bank.models.load import load_base
from bench.rig.people import MANNERS, people, write_people
from tests.support.bank_bench import Bench

ANCHORS = 4


@dataclass(frozen=True)
class World:
    """A bank of people with manners of their own, and a model that reads with its adapters."""

    manifest: BankManifest
    matrix: MetaMatrix
    bank: ServingBank
    embedder: Embedder
    model: Any
    tokenizer: Any

    def items(self, topic: str, manner: str, first: int = 20, count: int = 10) -> list[Example]:
        numbers = range(first, first + count)
        return [encode_pair(self.tokenizer, f"Say {n} on {topic}", f"{n}{manner}", 200) for n in numbers]

    def loss(self, recipe: FusionRecipe, examples: list[Example]) -> float:
        with attached(self.model, fuse(self.matrix, recipe, torch.float32)) as here:
            return mean_loss(here.model, examples)


@pytest.fixture(scope="module")
def world(bench: Bench, tiny_model_folder: Path, embedder: Embedder) -> World:
    users = write_people(bench.folder / "twelve.json", people(12))
    manifest = bench.build("signed", inputs={"users": users}, anchors=ANCHORS, steps=30, common_steps=20)
    bank = ServingBank.open(bench.folder / "signed", embedder.id)
    model, tokenizer = load_base(tiny_model_folder, "float32")
    return World(manifest, bench.matrix("signed", manifest), bank, embedder, model, tokenizer)


@pytest.fixture(scope="module")
def signer(world: World) -> Signer:
    return Signer(world.model, world.matrix, Acts.EVERYWHERE)


def test_products_are_what_a_small_step_along_each_row_gains(world: World, signer: Signer) -> None:
    examples, small = world.items("something new", MANNERS[0]), 20

    def loss(*terms: Term) -> float:
        return world.loss(FusionRecipe(world.manifest.short, world.manifest.method, True, terms), examples)

    common = loss()
    gained = [(common - loss(Term(anchor, small))) * PER_MILLE / small for anchor in range(ANCHORS)]
    found = signer.signature(world.manifest.short, examples)
    assert found.tokens == sum(example.output_tokens for example in examples)
    assert found.products == pytest.approx(gained, rel=0.2, abs=0.05 * np.abs(gained).max())


def test_items_of_a_manner_move_a_person_on_from_their_topic(world: World, signer: Signer) -> None:
    embedding, short = world.embedder.embed(["Say 1 on something new"])[0], world.manifest.short
    topic, best, gains, signs = world.bank.personalise(embedding), set(), [], set()
    assert topic.source == "topic"
    for manner in MANNERS:
        items = world.items("something new", manner)
        found = world.bank.personalise(embedding, signer.signature(short, items))
        assert found.source == "signature"
        assert world.bank.personalise(embedding, signer.signature("00000000", items)) == topic  # of another bank
        best.add(max(found.weights, key=lambda weight: weight.weight).anchor)
        later = world.items("rain", manner, first=40, count=6)
        gains.append(world.loss(topic.recipe, later) - world.loss(found.recipe, later))
        signs |= {term.weight > 0 for term in found.recipe.terms}
    assert len(best) > 1  # one topic, several anchors
    assert sorted(gains)[1] > 0  # no anchor has one of the six manners
    assert signs == {True, False}
