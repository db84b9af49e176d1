"""How sure a mean over users is: bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its 95 % interval, over `n` users."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def counts(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} ({self.low:+.4f} to {self.high:+.4f}, {self.n} users)"


def over_users(differences: Sequence[float], seed: int = 0) -> Interval:
    """The mean of one difference a user, and the middle 95 % of the means of users drawn with replacement."""
    values = np.asarray(differences, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(0, len(values), (DRAWS, len(values)))
    low, high = np.percentile(values[drawn].mean(axis=1), (2.5, 97.5))
    return Interval(float(values.mean()), float(low), float(high), len(values))
