"""The difference between two arms, with an interval that stays valid however often somebody looks.

A *people-week* is one person in one week, with one number from 0 to 1. A hash of person and week draws the arm:
`lower` (answered one level lower) or `full`. An arm keeps three totals of its numbers, whatever their count.

The interval is an asymptotic confidence sequence with the normal mixture boundary of Robbins: Waudby-Smith, Arbour,
Sinha, Kennedy and Ramdas, *Time-uniform central limit theory and asymptotic confidence sequences*, Annals of Statistics
52 (2024). It holds the true difference at all looks together with a chance of 1 − alpha; a t-interval holds it at one
look that was planned beforehand. It is valid if

- the arms are drawn independently for each person and week. A person's weeks may be as alike as they are; the interval
  is about these people and weeks, not about people to come.
- a people-week enters the totals once, when its week is over by the clock, with a number that no longer changes. A
  running week's numbers settle from day to day, which is not the walk that the boundary is for. Where people's weeks
  end on different weekdays, the totals grow every day.
- the totals begin at one moment and are added up from there. Totals of the last N weeks are a new experiment each week,
  and one of many experiments errs.
- the share of the arm `lower` stays the same from that moment on; else a trend over time looks like an effect.

`python -m evaluation.studies.holdout` shows how often the interval errs if so.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from math import log, sqrt

ALPHA = 0.05
MIN_PEOPLE_WEEKS = 30
"""People-weeks in each arm below which nothing is said: the central limit theorem has not set in."""
TUNED_FOR = 500
"""Effective people-weeks (`_effective`) at which the interval is narrowest, in standard errors. Several hundred are
what a relative effect of 10 % takes where the standard deviation is near the mean. A tenth of them make the interval
27 % wider than the best, ten times as many 7 %."""


@dataclass(frozen=True, slots=True)
class Totals:
    """The totals of one arm: `n` people-weeks, the sum of their numbers, and the sum of their squares."""

    n: int = 0
    sum: float = 0.0
    sum_squares: float = 0.0

    @property
    def mean(self) -> float:
        """Return the mean of the numbers; there must be some."""
        return self.sum / self.n

    @property
    def variance_of_mean(self) -> float:
        """Return the variance of `mean`, as if there were two more people-weeks, one with 0 and one with 1.

        Where all numbers are equal, such as no answer discarded, their own variance is 0 and an interval without width
        would claim to be sure. The two fade as the arm grows.
        """
        n, total, squares = self.n + 2, self.sum + 1, self.sum_squares + 1
        return max(0.0, squares - total * total / n) / ((n - 1) * self.n)


@dataclass(frozen=True, slots=True)
class SequentialInterval:
    """An estimate, and an interval that holds the true value with 95 %, however often somebody looks."""

    estimate: float  # in the unit of the numbers; a share in `relative`
    low: float
    high: float

    def excludes(self, value: float = 0.0) -> bool:
        return not self.low <= value <= self.high


def difference(lower: Totals, full: Totals) -> SequentialInterval | None:
    """Return the mean of `lower` less the mean of `full`; None below `MIN_PEOPLE_WEEKS` in either arm."""
    if not _enough(lower, full):
        return None
    estimate = lower.mean - full.mean
    margin = _standard_errors(_effective(lower, full)) * sqrt(lower.variance_of_mean + full.variance_of_mean)
    return SequentialInterval(estimate, estimate - margin, estimate + margin)


def relative(lower: Totals, full: Totals) -> SequentialInterval | None:
    """Return the difference over the mean of `lower`: 0.18 is "saves 18 %"; at most 1, below 0 where `full` is higher.

    Holds each share r for which lower·(1 − r) − full is not yet told from 0 (Fieller 1954), so it excludes 0 exactly
    when `difference` does. None where that says nothing, or the mean of `lower` is itself not told from 0.
    """
    if not _enough(lower, full):
        return None
    squared = _standard_errors(_effective(lower, full)) ** 2
    below = lower.mean**2 - squared * lower.variance_of_mean
    if below <= 0:
        return None
    above = full.mean**2 - squared * full.variance_of_mean
    middle = lower.mean * full.mean
    half = sqrt(max(0.0, middle * middle - below * above))
    least, most = max(0.0, (middle - half) / below), (middle + half) / below
    return SequentialInterval(1 - full.mean / lower.mean, 1 - most, 1 - least)


def people_weeks_needed(lower: Totals, full: Totals) -> int | None:
    """Return about how many more people-weeks, of both arms in today's shares, until the interval excludes 0.

    Takes the difference seen so far; 0 if it is excluded already. None where `difference` says nothing, and where a
    million times as many would not do.
    """
    if not _enough(lower, full):
        return None
    effect = lower.mean - full.mean
    variance, effective = lower.variance_of_mean + full.variance_of_mean, _effective(lower, full)
    known = lower.n + full.n

    def is_excluded(more: int) -> bool:
        times = 1 + more / known
        return effect**2 > _standard_errors(times * effective) ** 2 * variance / times

    most = 1_000_000 * known
    more = bisect_left(range(most), True, key=is_excluded)
    return more if more < most else None


def _enough(lower: Totals, full: Totals) -> bool:
    return min(lower.n, full.n) >= MIN_PEOPLE_WEEKS


def _effective(lower: Totals, full: Totals) -> float:
    """Return the size that a single arm against a known mean would need to be as sure; near the smaller arm's.

    It is the clock of the boundary: in proportion to the inverse of the difference's variance, and free of the numbers.
    """
    return lower.n * full.n / (lower.n + full.n)


def _standard_errors(effective: float) -> float:
    """Return the margin in standard errors (Theorem 2.2 of the paper with σ/√t as the unit; rho from its appendix)."""
    rho_squared_t = (log(1 - 2 * log(ALPHA)) - 2 * log(ALPHA)) * effective / TUNED_FOR
    return sqrt((1 + 1 / rho_squared_t) * log((1 + rho_squared_t) / ALPHA**2))
