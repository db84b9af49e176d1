"""Steps from the common row: the posterior mean against the formula, its limits, and what becomes of it in a recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.recipe import FusionMethod, UserAdapterId, parse_recipe
from bank.building.resume import Workbench
from bank.building.signer import measure_curvature
from bank.errors import BankError
from bank.items.histories import History
from bank.items.profile import Item, Vectors
from bank.items.tasks import get_task
from bank.lookup.index import AnchorIndex
from bank.lookup.serving import AnchorWeight, ServingBank, common_recipe, posterior_weights, recipe_of_steps
from bank.lookup.signature import Curvature, Signature
from bank.manifest import BankManifest, PosteriorRule, WeightRule
from tests.unit.bank.test_weights import index_at, manifest, saved_bank

N = 4
SIGNED = WeightRule(anchors=2, strength=0.4, posterior=PosteriorRule(anchors=3, decay=100.0))


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
    found = Curvature.of(measured(seed)).step(Signature("00000000", tokens, x), decay)
    assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)


def test_little_evidence_makes_small_steps_and_much_of_it_goes_to_the_minimum() -> None:
    h = np.diag([1.0, 2.0, 3.0, 4.0])
    x = np.array([1.0, -1.0, 0.5, 0.0])
    few, many = (Curvature.of(h).step(Signature("00000000", tokens, x), 100.0) for tokens in (1, 10**9))
    assert np.abs(few).max() < 0.01
    assert many == pytest.approx(x / np.diag(h), rel=1e-5)


@pytest.mark.parametrize(("number", "reason"), [(0.0, "no positive curvature"), (np.nan, "not finite")])
def test_a_curvature_that_says_nothing_is_refused(number: float, reason: str) -> None:
    with pytest.raises(BankError, match=reason):
        Curvature.of(np.full((N, N), number))


def signed_bank(folder: Path) -> BankManifest:
    return saved_bank(folder, weights=SIGNED, method=FusionMethod.SHARED, common=True)


class Bowl:
    """A signer of a quadratic loss; says something of so many places, then is killed."""

    def __init__(self, h: np.ndarray, places: int = 99) -> None:
        self._h, self._left = h, places

    def slopes(self, examples: object, beyond: int | None = None) -> Vectors:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        return np.ones(N) if beyond is None else np.ones(N) + self._h[:, beyond]


def test_the_curvature_is_how_slopes_change_and_columns_of_a_killed_run_are_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bank.building.signer.encode_pair", lambda *_: None)
    items = tuple(Item(str(i), {"input": f"say {i}", "output": str(i)}) for i in range(12))
    told: list[int] = []

    def measure(signer: Bowl) -> Vectors:
        return measure_curvature(
            signer, [History("one", items)], get_task("chat"), None, Workbench(tmp_path),  # type: ignore[arg-type]
            anchors=N, max_tokens=8, seed=0, on_anchor=lambda done, of: told.append(done),
        )  # fmt: skip

    h = measured()
    with pytest.raises(KeyboardInterrupt):
        measure(Bowl(h, places=3))
    assert measure(Bowl(h, places=2)) == pytest.approx(h)
    assert told == [0, 1, 2, 0, 1, 2, 3, 4]


def test_evidence_leads_to_steps_and_topics_to_coarse_shares(tmp_path: Path) -> None:
    written, embedding = signed_bank(tmp_path), index_at(1.0)[1]
    bank = ServingBank.open(tmp_path, "e" * 16)
    found = bank.personalise(embedding, Signature(written.short, 10**6, np.array([1.0, -1.0, 0.5, 0.1], np.float32)))
    assert found.source == "signature"
    assert found.recipe.name == f"mta3:{written.short}:shared:c+a00*1000+a01*-500+a02*167"
    assert [weight.anchor for weight in found.weights] == [0, 1, 2]
    assert found.weights[1].gain == -1.0
    assert parse_recipe(found.recipe.name) == found.recipe
    topic = bank.personalise(embedding)
    assert (topic.source, topic.recipe.name) == ("topic", f"mta3:{written.short}:shared:c+a00*300+a01*100")
    assert bank.personalise(embedding, Signature("00000000", 9, np.ones(N, np.float32))) == topic


def test_however_many_anchors_there_are_a_name_holds_the_longest_steps() -> None:
    many = 1024
    index = AnchorIndex.build(np.eye(many, 384, dtype=np.float32) + 0.001)
    signature = Signature("9f2c41d0", 10**6, np.linspace(-4.0, 4.0, many, dtype=np.float32))
    rule = PosteriorRule(anchors=many, decay=1.0)
    weights = posterior_weights(index, rule, Curvature.of(np.eye(many)), index.vectors(range(1))[0], signature)
    recipe = replace(recipe_of_steps(manifest(), weights), user_adapter=UserAdapterId(f"{'a' * 26}", f"{'a' * 26}"))
    assert parse_recipe(recipe.name) == recipe
    assert len(weights) > 300
    assert min(abs(weight.weight) for weight in weights) > 2.5


def test_steps_are_shortened_by_a_share_bounded_and_dropped_where_they_round_to_nothing(tmp_path: Path) -> None:
    written = signed_bank(tmp_path)
    weights = [AnchorWeight(anchor, step, 0.0) for anchor, step in ((2, -9.0), (0, 0.5), (1, 0.0004))]
    assert recipe_of_steps(written, weights).name.endswith(":c+a00*500+a02*-4000")
    assert recipe_of_steps(written, weights, 0.5).name.endswith(":c+a00*250+a02*-4000")
    assert recipe_of_steps(written, weights, 0.0).name.endswith(":c")
    assert common_recipe(written).name == f"mta3:{written.short}:shared:c"
