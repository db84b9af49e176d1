"""Steps from the common row: the posterior mean against the formula, its limits, and what becomes of it in a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.recipe import FusionMethod, UserAdapterId, parse_recipe
from bank.errors import BankError
from bank.evaluation.methods import Evaluator
from bank.evaluation.scoring import OpenBank
from bank.lookup.index import AnchorIndex
from bank.lookup.posterior import Curvature
from bank.lookup.serving import ServingBank
from bank.lookup.signature import Signature
from bank.lookup.weights import AnchorWeight, common_recipe, make_recipe, posterior_weights
from bank.manifest import CURVATURE_FILE, INDEX_FILE, BankManifest, file_sha256, write_manifest
from bank.rules import PosteriorRule, WeightRule
from tests.unit.bank.test_weights import damage, index_at, manifest

N = 4
SIGNED = WeightRule(anchors=2, strength=0.5, posterior=PosteriorRule(anchors=3, decay=100.0))


def measured(seed: int = 0) -> np.ndarray:
    """A curvature as it is measured: not quite symmetric, positive but for noise."""
    numbers = np.random.default_rng(seed)
    root = numbers.normal(size=(N, N))
    return root @ root.T + 0.01 * numbers.normal(size=(N, N))


@given(seed=st.integers(0, 999), tokens=st.integers(1, 5000), decay=st.floats(1, 1000))
def test_a_step_is_the_posterior_mean(seed: int, tokens: int, decay: float) -> None:
    h = measured(seed)
    x = np.random.default_rng(seed + 1).normal(size=N)
    values, vectors = np.linalg.eigh((h + h.T) / 2)
    h = vectors @ np.diag(np.clip(values, 0, None)) @ vectors.T
    scale = decay * np.trace(h) / N
    wanted = np.linalg.solve(tokens * h + scale * np.eye(N), tokens * x)
    assert Curvature.of(measured(seed)).step(x, tokens, decay) == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_little_evidence_makes_small_steps_and_much_of_it_goes_to_the_minimum() -> None:
    h = np.diag([1.0, 2.0, 3.0, 4.0])
    x = np.array([1.0, -1.0, 0.5, 0.0])
    few, many = (Curvature.of(h).step(x, tokens, 100.0) for tokens in (1, 10**9))
    assert np.abs(few).max() < 0.01
    assert many == pytest.approx(x / np.diag(h), rel=1e-5)


@pytest.mark.parametrize(("number", "reason"), [(0.0, "does not bend"), (np.nan, "not finite")])
def test_a_curvature_that_says_nothing_is_refused(number: float, reason: str) -> None:
    with pytest.raises(BankError, match=reason):
        Curvature.of(np.full((N, N), number))


def signed_bank(folder: Path) -> tuple[BankManifest, np.ndarray]:
    """A bank with the posterior, and an embedding."""
    index, embedding = index_at(0.9, 0.3, -0.2, 0.1)
    index.save(folder / INDEX_FILE)
    np.save(folder / CURVATURE_FILE, np.diag([1.0, 2.0, 3.0, 4.0]))
    files = {name: file_sha256(folder / name) for name in (INDEX_FILE, CURVATURE_FILE)}
    changes = {"files": files, "weights": SIGNED, "method": FusionMethod.SHARED, "common": True}
    return write_manifest(folder, manifest().model_copy(update=changes)), embedding


def test_evidence_leads_to_signed_weights_and_topics_to_shares_in_the_same_format(tmp_path: Path) -> None:
    written, embedding = signed_bank(tmp_path)
    bank = ServingBank.open(tmp_path, "e" * 16)
    found = bank.personalise(embedding, Signature(written.short, 10**6, np.array([1.0, -1.0, 0.5, 0.1], np.float32)))
    assert found.source == "signature"
    assert found.recipe.name == f"mta2:{written.short}:shared:c+a00*1000+a01*-500+a02*167"
    assert [weight.anchor for weight in found.weights] == [0, 1, 2]
    assert found.weights[1].gain == -1.0
    assert parse_recipe(found.recipe.name) == found.recipe
    topic = bank.personalise(embedding)
    assert (topic.source, topic.recipe.name) == ("topic", f"mta2:{written.short}:shared:c+a00*375+a01*125")
    assert bank.personalise(embedding, Signature("00000000", 9, np.ones(N, np.float32))) == topic


def test_however_many_anchors_there_are_a_name_holds_the_longest_steps() -> None:
    many = 1024
    index = AnchorIndex.build(np.eye(many, 384, dtype=np.float32) + 0.001)
    signature = Signature("9f2c41d0", 10**6, np.linspace(-4.0, 4.0, many, dtype=np.float32))
    rule = PosteriorRule(anchors=many, decay=1.0)
    weights = posterior_weights(index, rule, Curvature.of(np.eye(many)), index.vectors(range(1))[0], signature)
    bank = manifest().model_copy(update={"weights": WeightRule(anchors=2, strength=0.5, posterior=rule)})
    recipe = replace(make_recipe(bank, weights), user_adapter=UserAdapterId(f"{'a' * 26}", f"{'a' * 26}"))
    assert parse_recipe(recipe.name) == recipe
    assert len(weights) > 300
    assert min(abs(weight.weight) for weight in weights) > 2.5


def test_steps_are_shortened_by_a_share_bounded_and_dropped_where_they_round_to_nothing(tmp_path: Path) -> None:
    written, _ = signed_bank(tmp_path)
    weights = [AnchorWeight(anchor, step, 0.0) for anchor, step in ((2, -9.0), (0, 0.5), (1, 0.0004))]
    assert make_recipe(written, weights).name.endswith(":c+a00*500+a02*-4000")
    assert make_recipe(written, weights, 0.5).name.endswith(":c+a00*250+a02*-4000")
    assert make_recipe(written, weights, 0.0).name.endswith(":c")


def test_the_common_row_alone_is_a_recipe_of_the_banks_format(tmp_path: Path) -> None:
    written, _ = signed_bank(tmp_path)
    bank = OpenBank(ServingBank.open(tmp_path, "e" * 16), Mock(), tmp_path)
    adapter = Evaluator(bank=bank, scorer=Mock(), embedder=Mock(), max_tokens=64).common(Mock(), seed=0)
    assert adapter.recipe.name == f"mta2:{written.short}:shared:c"
    plain = written.model_copy(update={"weights": WeightRule(anchors=2)})
    assert common_recipe(plain).name == f"mta1:{plain.short}:shared:c"


def test_a_bank_whose_curvature_is_damaged_is_refused(tmp_path: Path) -> None:
    signed_bank(tmp_path)
    damage(tmp_path / CURVATURE_FILE)
    with pytest.raises(BankError, match="damaged"):
        ServingBank.open(tmp_path, "e" * 16)


def test_a_bank_without_the_posterior_has_the_fingerprint_it_always_had() -> None:
    plain = manifest()
    old = plain.model_dump(mode="json", exclude={"fingerprint": True, "prior": True, "weights": {"posterior"}})
    assert "posterior" not in old["weights"]
    changed = plain.model_copy(update={"weights": SIGNED})
    assert plain.compute_fingerprint() != changed.compute_fingerprint()
    assert changed.signed and not plain.signed
