"""Uncertainty of means over users: bootstrap intervals, and tests of several methods against one.

A test decides significance, because intervals are too narrow with few users: with normal differences, a 95 % BCa
interval covers the true mean in about 90 % of cases with 10 users, 93 % with 20.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from scipy import stats

DRAWS = 9_999  # resamples per interval, and sign flips per test; a test with up to 13 users enumerates all flips
LEVEL = 0.05
_BATCH = 1_000  # resamples in memory at a time
Name = TypeVar("Name")


@dataclass(frozen=True, slots=True)
class Interval:
    """The mean of one difference per user over `n` users, with its 95 % interval."""

    mean: float
    low: float
    high: float
    n: int
    p: float | None = None  # Holm-adjusted for all methods compared with the same one; None if there was no test

    @property
    def significant(self) -> bool:
        return self.p is not None and self.p < LEVEL

    def __str__(self) -> str:
        star = "*" if self.significant else ""
        return f"{self.mean:+.4f}{star} ({self.low:+.4f} to {self.high:+.4f}, {self.n} users)"

    def cell(self, form: str) -> str:
        """Return a Markdown table cell, bold if the difference is significant; `form` formats numbers, e.g. `+.4f`."""
        mean, low, high = (format(value, form) for value in (self.mean, self.low, self.high))
        text = f"{mean} ({low} to {high})"
        return f"**{text}**" if self.significant else text


def over_users(differences: Sequence[float]) -> Interval:
    """Return the mean and its BCa bootstrap interval; the mean alone for one user or equal differences."""
    values = np.asarray(differences, np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2 or np.allclose(values, mean, rtol=1e-9, atol=1e-12):
        return Interval(mean, mean, mean, n)
    how = {"n_resamples": DRAWS, "batch": _BATCH, "method": "BCa", "rng": np.random.default_rng(0)}
    low, high = stats.bootstrap((values,), np.mean, **how).confidence_interval
    return Interval(mean, float(low), float(high), n)


def compare_together(differences: Mapping[Name, Sequence[float]]) -> dict[Name, Interval]:
    """Return the interval of each difference, one per user, with its p-value adjusted for all of them."""
    adjusted = holm([sign_flip_p(values) for values in differences.values()])
    return {
        name: replace(over_users(values), p=p) for (name, values), p in zip(differences.items(), adjusted, strict=True)
    }


def compare_methods(
    values: Mapping[str, Mapping[str, float]], untested: Collection[str] = ()
) -> Mapping[str, Mapping[str, Interval]]:
    """Compare each method's values by user with each other method that covers all its users, in the order of `values`.

    Differences from one method over the same users are tested together, except those of `untested` methods.
    """
    intervals: dict[str, dict[str, Interval]] = {method: {} for method in values}
    for other, theirs in values.items():
        differences = {
            method: [value - theirs[user] for user, value in ours.items()]
            for method, ours in values.items()
            if method != other and theirs.keys() >= ours.keys()
        }
        complete = {method: less for method, less in differences.items() if len(less) == len(theirs)}
        tested = compare_together({m: less for m, less in complete.items() if not {m, other} & set(untested)})
        for method, less in differences.items():
            intervals[method][other] = tested.get(method) or over_users(less)
    return intervals


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, ["---"] * len(heads), *lines))


def sign_flip_p(differences: Sequence[float]) -> float:
    """Return the two-sided p-value of a paired sign-flip permutation test."""
    values = np.asarray(differences, np.float64)
    if len(values) < 2:
        return 1.0
    how = {"permutation_type": "samples", "n_resamples": DRAWS, "batch": _BATCH, "rng": np.random.default_rng(0)}
    return float(stats.permutation_test((values,), np.mean, axis=-1, **how).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values by Holm's step-down method, which bounds the family-wise error rate (Holm, 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, position in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[position]))
        adjusted[position] = largest
    return adjusted
