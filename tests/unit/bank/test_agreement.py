"""Whether readings agree: rounding does, an adapter that acts too much, elsewhere or not at all does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bank.agreement import EXACT, ROUGH, Bound, agreements, bound_of
from bank.items.profile import Vectors
from bank.manifest import BASE, read_manifest

EARLIER = Path(__file__).parents[2] / "earlier" / "bank"
CHANCE = np.random.default_rng(0)
READ = np.cumsum(CHANCE.standard_normal((4, 200)), 0)  # each adapter moves a token by a nat or so
TRAINED = dict(zip((BASE, "c", "c+a00*500", "c+a00*500:u-key.id"), READ, strict=True))


def moved(by: float, under: str, name: str) -> dict[str, Vectors]:
    """What is served if the effect of one recipe, beyond another, is multiplied."""
    return TRAINED | {name: TRAINED[under] + by * (TRAINED[name] - TRAINED[under])}


@pytest.mark.parametrize(("bound", "noise"), [(EXACT, 1e-4), (ROUGH, 0.2)])
def test_rounding_is_within_the_bound(bound: Bound, noise: float) -> None:
    served = {name: read + noise * CHANCE.standard_normal(200) for name, read in TRAINED.items()}
    found = agreements(served, TRAINED, bound)
    assert all(agreement.within for agreement in found.values())
    assert all(agreement.effect == pytest.approx(1, abs=noise) for agreement in found.values())


@pytest.mark.parametrize("bound", [EXACT, ROUGH])
@pytest.mark.parametrize("by", [0.0, 0.8, 1.2])
@pytest.mark.parametrize(
    ("under", "name"), [(BASE, "c"), ("c", "c+a00*500"), ("c+a00*500", "c+a00*500:u-key.id")], ids=str
)
def test_an_effect_is_measured_beyond_what_it_adds_to(bound: Bound, by: float, under: str, name: str) -> None:
    found = agreements(moved(by, under, name), TRAINED, bound)[name]
    assert found.effect == pytest.approx(by)
    assert not found.within


def test_a_slot_of_another_recipe_is_not_within_the_bound() -> None:
    served = TRAINED | {"c+a00*500": TRAINED["c"] + CHANCE.standard_normal(200)}
    assert not agreements(served, TRAINED, ROUGH)["c+a00*500"].within


def test_an_adapter_without_an_effect_may_have_none() -> None:
    still = {BASE: READ[0], "c": READ[0]}
    assert agreements(still, still, EXACT)["c"].within


@pytest.mark.parametrize(
    ("dtypes", "bound"), [({"float32"}, EXACT), ({"float32", "bfloat16"}, ROUGH), ({"float32", None}, ROUGH)]
)
def test_the_bound_is_that_of_the_coarser_side(dtypes: set[object], bound: Bound) -> None:
    assert bound_of(dtypes) is bound


def test_a_bank_of_before_has_no_canary_and_its_fingerprint() -> None:
    manifest = read_manifest(EARLIER)
    assert manifest.canary is None
    assert manifest.compute_fingerprint() == manifest.fingerprint
