"""Whether an engine reads texts as training does, by the log-probabilities of their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from bank.items.profile import Vectors
from bank.manifest import BASE


class Bound(NamedTuple):
    """How far serving may be from training, in nats; docs/operations.md says what was measured."""

    largest: float  # difference of a token's log-probability
    mean: float  # absolute difference
    share: float  # of its effect that an adapter may have too much or too little
    noise: float  # in that effect, by rounding

    def __str__(self) -> str:
        effect = f"the effect within {self.share:.0%} and rounding"
        return f"at most {self.largest:g} nats apart, {self.mean:g} in the mean, {effect}"


EXACT, ROUGH = Bound(0.01, 0.001, 0.01, 0.01), Bound(2.5, 0.4, 0.05, 1.2)


def bound_of(dtypes: Set[object]) -> Bound:
    """Return the bound by the dtypes of engine and training; that of a quantised engine is its quantisation."""
    return EXACT if dtypes == {"float32"} else ROUGH


@dataclass(frozen=True, slots=True)
class Agreement:
    largest: float  # difference of a token's log-probability, in nats
    mean: float  # absolute difference
    effect: float  # of the adapter, over that in training
    within: bool  # the bound

    def __str__(self) -> str:
        verdict = "" if self.within else ": NOT AS IN TRAINING"
        return f"{self.largest:.4f} nats apart, {self.mean:.4f} in the mean, effect {self.effect:.3f}{verdict}"


def agreements(served: Mapping[str, Vectors], trained: Mapping[str, Vectors], bound: Bound) -> dict[str, Agreement]:
    """Compare log-probabilities [T] by recipe; an adapter's effect is beyond the recipe that its name begins with."""
    found = {}
    for name, wanted in trained.items():
        under = max((one for one in trained if one != name and name.startswith(one)), key=len, default=BASE)
        gaps, moved = np.abs(served[name] - wanted), wanted - trained[under]
        length, added = float(np.linalg.norm(moved)), served[name] - served[under]
        effect = float(added @ moved) / length**2 if length else 1.0
        within = gaps.max() <= bound.largest and gaps.mean() <= bound.mean
        within = within and abs(effect - 1) * length <= bound.share * length + bound.noise
        found[name] = Agreement(float(gaps.max()), float(gaps.mean()), effect, bool(within))
    return found
