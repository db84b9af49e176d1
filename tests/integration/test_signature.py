"""Signatures on a tiny model: what they predict is what happens, and they tell manners apart where topics cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from adapters.fusion import fuse
from adapters.recipe import PER_MILLE, FusionMethod, FusionRecipe, Term
from adapters.training.attached import attached
from adapters.training.example import Example
from adapters.training.loss import mean_loss
from bank.building.signer import Signer
from bank.items.prompt import encode_pair
from bank.lookup.embedder import Embedder
from bank.lookup.serving import ServingBank
from bank.manifest import BankManifest
from bank.models.load import load_base
from bench.rig.people import MANNERS, people, write_people
from bench.rig.tiny import WORLDS
from tests.support.bank_bench import Bench

ANCHORS = 4


@pytest.fixture(scope="module")
def signed(bench: Bench) -> BankManifest:
    """A bank of people with manners of their own."""
    users = write_people(bench.folder / "twelve.json", people(12))
    return bench.build("signed", inputs={"users": users}, anchors=ANCHORS, steps=30, common_steps=20)


@pytest.fixture(scope="module")
def base(tiny_model_folder: Path) -> tuple[Any, Any]:
    return load_base(tiny_model_folder, "float32")


@pytest.fixture(scope="module")
def signer(bench: Bench, signed: BankManifest, base: tuple[Any, Any]) -> Signer:
    return Signer(base[0], bench.matrix("signed", signed))


@pytest.fixture(scope="module")
def embedder(embedder_folder: Path) -> Embedder:
    return Embedder.load(embedder_folder)


@pytest.fixture(scope="module")
def bank(bench: Bench, signed: BankManifest, embedder: Embedder) -> ServingBank:
    return ServingBank.open(bench.folder / "signed", embedder.id)


def items(tokenizer: Any, topic: str, manner: str) -> list[Example]:
    return [encode_pair(tokenizer, f"Say {n} on {topic}", f"{n}{manner}", 200) for n in range(20, 30)]


def test_products_are_what_a_small_step_along_each_row_gains(
    bench: Bench, signed: BankManifest, signer: Signer, base: tuple[Any, Any]
) -> None:
    matrix, examples = bench.matrix("signed", signed), items(base[1], "something new", MANNERS[0])

    def loss(*terms: Term) -> float:
        recipe = FusionRecipe(signed.short, FusionMethod.SHARED, True, terms)
        with attached(base[0], fuse(matrix, recipe, torch.float32)) as here:
            return mean_loss(here.model, examples)

    common, small = loss(), 20
    gained = [(common - loss(Term(anchor, small))) * PER_MILLE / small for anchor in range(ANCHORS)]
    found = signer.signature(signed.short, examples)
    assert found.tokens == sum(example.output_tokens for example in examples)
    assert found.products == pytest.approx(gained, rel=0.2, abs=0.05 * np.abs(gained).max())


def test_who_writes_like_one_anchor_about_the_topic_of_another_gets_the_one(
    signed: BankManifest, signer: Signer, base: tuple[Any, Any], embedder: Embedder, bank: ServingBank
) -> None:
    manners = {}
    for manner in MANNERS:
        signature = signer.signature(signed.short, items(base[1], WORLDS[0], manner))
        embedding = embedder.embed([f"Say 1 on {WORLDS[0]}\n1{manner}"])[0]
        found = bank.personalise(embedding, signature)
        assert found.source == "signature"
        best = max(found.weights, key=lambda weight: weight.weight)
        manners[manner] = best.anchor
        assert bank.personalise(embedding).source == "topic"
    assert len(set(manners.values())) > 1  # one topic, several anchors


def test_the_posterior_lowers_the_loss_of_what_somebody_writes_next(
    bench: Bench, signed: BankManifest, signer: Signer, base: tuple[Any, Any], *, embedder: Embedder, bank: ServingBank
) -> None:
    matrix = bench.matrix("signed", signed)
    embedding = embedder.embed([f"Say 1 on {WORLDS[0]}"])[0]
    gains, signs = [], set()
    for manner in MANNERS:
        signature = signer.signature(signed.short, items(base[1], "something new", manner))
        recipes = [bank.personalise(embedding, signature, share).recipe for share in (0.0, 1.0)]
        later = [encode_pair(base[1], f"Say {n} on rain", f"{n}{manner}", 200) for n in range(40, 46)]
        losses = []
        for recipe in recipes:
            with attached(base[0], fuse(matrix, recipe, torch.float32)) as here:
                losses.append(mean_loss(here.model, later))
        gains.append(losses[0] - losses[1])
        signs |= {term.weight > 0 for term in recipes[1].terms}
    assert min(gains) > 0, "a step was one in the wrong direction"
    assert signs == {True, False}


def test_a_signature_of_another_bank_or_of_nothing_says_nothing(
    signer: Signer, base: tuple[Any, Any], embedder: Embedder, bank: ServingBank
) -> None:
    embedding = embedder.embed(["anything"])[0]
    other = signer.signature("00000000", items(base[1], WORLDS[0], MANNERS[0]))
    assert bank.personalise(embedding, other) == bank.personalise(embedding)
