"""Look every day at simulated people: wrong findings without an effect, and days until an effect is seen.

    python -m evaluation.studies.holdout --out docs/figures/worth.json

Without an effect, the table gives the share of runs in which an interval excludes 0 at some look: the server's
interval, and a t-interval. With an effect, it gives the days until the server's interval excludes 0 in 10, 50, 80 and
90 % of the runs, beside the days of a t-test with one look and a power of 80 %, and the share of runs in which an
interval ever excludes the true effect.

A few people ask most (Zipf), and each gives feedback to a share of answers of their own, a fifth on average. A person's
answers are alike, a week's a little more so. The arms are drawn anew for each person and week. Both arms' numbers are
simulated for everyone, so that the true difference of the people-weeks so far is known at each look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import ceil, inf, sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Annotated

import numpy as np
import numpy.typing as npt
import typer
from rich.progress import Progress

from bench import script
from bench.page.report import Figures, tabulate
from server.gateway.experiments.confidence import Totals, difference, relative

Array = npt.NDArray[np.float64]

PEOPLE, HOLDOUTS = (1000, 10_000), (0.05, 0.5)
WITHOUT = ("people", "number", "lower arm", "people-weeks", "ever wrong", "t-interval")
WITH = ("people", "number", "lower arm", "seen", "10 %", "50 %", "80 %", "90 %", "t-test", "ever wrong", "relative")

DAYS = 7
FEEDBACK = (0.5, 2.0)
"""Beta distribution of a person's share of answers with feedback: 0.2 on average, and many people near 0."""
ALIKE_WEEK, ALIKE_ANSWER = 20.0, 2.0
"""Concentrations of the beta distributions of a person's weeks and of a week's graded answers."""
TWO_SIDED, POWER = NormalDist().inv_cdf(0.975), NormalDist().inv_cdf(0.8)


@dataclass(frozen=True, slots=True)
class Metric:
    """A number of a person's week.

    Attributes:
        mean: its mean over people in the arm `lower`.
        graded: whether an answer has a share (of its text that was changed) or counts as 0 or 1.
        of_all: whether all answers count, or only those with feedback.
        alike: concentration of the beta distribution of people's means; a large one makes all people the same.
    """

    name: str
    mean: float
    graded: bool = False
    of_all: bool = False
    alike: float = 3.0


METRICS = (
    Metric("changed", 0.3, graded=True),
    Metric("discarded", 0.05),
    Metric("silent", 0.8, of_all=True),
    Metric("chance alone", 0.3, of_all=True, alike=1e4),
)


@dataclass(frozen=True, slots=True)
class Use:
    """How many people use the assistant, and how.

    Attributes:
        answers: mean number a person and week; by Zipf's law with 1,000 people, half of them get fewer than a quarter.
        effect: mean relative effect; a person's own is from 0 to twice it.
    """

    people: int
    weeks: int
    answers: float
    effect: float


@dataclass(frozen=True, slots=True)
class Without:
    """What all runs without an effect found: shares of runs in which an interval excluded 0 at some look."""

    people_weeks: float  # mean number at the end, both arms
    wrong: float  # the server's interval, a look each day
    wrong_naive: float  # a t-interval, a look each day


@dataclass(frozen=True, slots=True)
class With:
    """What all runs with the effect found, a look each day: shares of runs, and days (None: fewer runs saw it)."""

    seen: float  # the interval excluded 0 on some day
    days: tuple[int | None, ...]  # until seen in 10, 50, 80 and 90 % of the runs
    planned_days: int | None  # until a t-test planned for a power of 80 %
    wrong: float  # the interval excluded the truth on some day
    wrong_relative: float  # the same of `relative`


@dataclass(slots=True)
class _Tally:
    """Sums over the runs of one setting."""

    wrong: int = 0
    naive: int = 0
    relative: int = 0
    people_weeks: int = 0
    days: list[float] = field(default_factory=list)
    variances: list[list[float]] = field(default_factory=list)
    truths: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Numbers:
    """Everybody's number so far on each day, and whether there is one: [people, weeks, DAYS]."""

    present: Array
    lower: Array
    full: Array
    weekdays: Array  # [people, DAYS], 1 for the day on which the person's weeks end

    def finished(self, arm: Array, chosen: Array) -> list[Totals]:
        """Return the totals of each day over the chosen people-weeks [people, weeks] that have ended.

        A person's weeks end on a weekday of their own; so the first week is shorter for most.
        """
        days = np.nonzero(self.weekdays)[1]
        people = np.arange(len(arm))
        ends = [part[:, :, -1].copy() for part in (self.present, arm)]
        for end, part in zip(ends, (self.present, arm), strict=True):
            end[:, 0] = part[people, 0, days]
        present, numbers = ends
        sums = []
        for part in (present, numbers, numbers * numbers):
            grown = np.einsum("jw,jw,jd->wd", chosen, part, self.weekdays, optimize=True)
            sums.append(grown.ravel().cumsum().tolist())
        return [Totals(round(n), total, squares) for n, total, squares in zip(*sums, strict=True)]


def main(
    *,
    people: Annotated[list[int], typer.Option(help="Number of people; may be repeated.", min=100)] = PEOPLE,  # type: ignore[assignment]
    holdout: Annotated[list[float], typer.Option(help="Share of the arm `lower`; may be repeated.")] = HOLDOUTS,  # type: ignore[assignment]
    runs: Annotated[int, typer.Option(help="Number of simulated tenants.", min=10)] = 1000,
    weeks: Annotated[int, typer.Option(help="Number of weeks.", min=2)] = 13,
    answers: Annotated[float, typer.Option(help="Mean number of answers a person and week.")] = 10,
    effect: Annotated[float, typer.Option(help="Mean relative effect; a person's own is from 0 to twice it.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Simulate, and print both tables."""
    without: list[list[object]] = []
    having: list[list[object]] = []
    with Progress() as progress:
        for size in people:
            for metric in METRICS:
                use = Use(size, weeks, answers, effect)
                task = progress.add_task(f"{size:,} people, {metric.name}", total=runs)
                step = partial(progress.advance, task)
                outcomes = simulate(metric, use, holdout, runs=runs, seed=seed, step=step)
                for fraction, (none, some) in zip(holdout, outcomes, strict=True):
                    about = [size, metric.name, fraction]
                    without.append([*about, round(none.people_weeks), none.wrong, none.wrong_naive])
                    having.append([*about, some.seen, *some.days, some.planned_days, some.wrong, some.wrong_relative])
    title = f"{runs:,} runs, {weeks} weeks, a look each day"
    tables = [
        Figures(f"No effect: {title}", WITHOUT, without),
        Figures(f"A relative effect of {effect:.0%}, days until seen: {title}", WITH, having),
    ]
    tabulate(tables, out)


def simulate(
    metric: Metric, use: Use, holdouts: Sequence[float], *, runs: int, seed: int, step: Callable[[], None]
) -> list[tuple[Without, With]]:
    """Return for each share of the arm `lower` what `runs` runs found; calls `step` after each run."""
    generator = np.random.default_rng([seed, use.people, round(1000 * metric.mean), round(metric.alike)])
    tallies = [(_Tally(), _Tally()) for _ in holdouts]
    everyone = np.ones((use.people, use.weeks))
    for _ in range(runs):
        people = simulate_numbers(metric, use, generator)
        arms = generator.random(everyone.shape)
        true_lower = people.finished(people.lower, everyone)
        true_full = people.finished(people.full, everyone)
        for holdout, (same, better) in zip(holdouts, tallies, strict=True):
            chosen = (arms < holdout).astype(float)
            lower = people.finished(people.lower, chosen)
            unmoved = people.finished(people.lower, 1 - chosen)
            _look(lower, unmoved, true_lower, true_lower, same)
            _look(lower, people.finished(people.full, 1 - chosen), true_lower, true_full, better)
        step()
    return [(_without(same, runs), _with(better, runs)) for same, better in tallies]


def simulate_numbers(metric: Metric, use: Use, generator: np.random.Generator) -> Numbers:
    """Return one run: numbers of both arms for everybody, whichever arm they are drawn into."""
    shape = (use.people, use.weeks, DAYS)
    weights = 1 / np.arange(1, use.people + 1)
    rates = use.answers * use.people * weights / weights.sum() / DAYS
    if not metric.of_all:
        rates *= generator.beta(*FEEDBACK, use.people)
    counts = generator.poisson(rates[:, None, None], shape)
    persons = _beta(generator, np.full(use.people, metric.mean), metric.alike)
    weeks = _beta(generator, np.repeat(persons[:, None], use.weeks, axis=1), max(ALIKE_WEEK, metric.alike))
    own = 1 - 2 * use.effect * generator.random(use.people)[:, None, None]
    if metric.graded:
        cells = np.repeat(np.arange(counts.size), counts.ravel())
        answers = _beta(generator, weeks.ravel()[cells // DAYS], ALIKE_ANSWER)
        sums = np.bincount(cells, answers, counts.size).reshape(shape)
        better = sums * own
    else:
        whole = generator.binomial(counts, weeks[:, :, None])
        sums, better = whole.astype(float), generator.binomial(whole, own).astype(float)
    so_far = counts.cumsum(axis=2)
    divisor = np.maximum(so_far, 1)
    lower, full = (part.cumsum(axis=2) / divisor for part in (sums, better))
    return Numbers((so_far > 0).astype(float), lower, full, np.eye(DAYS)[generator.integers(DAYS, size=use.people)])


def _beta(generator: np.random.Generator, means: Array, concentration: float) -> Array:
    inner = np.clip(means, 1e-3, 1 - 1e-3)
    return generator.beta(inner * concentration, (1 - inner) * concentration)


def _look(
    lower: Sequence[Totals],
    full: Sequence[Totals],
    true_lower: Sequence[Totals],
    true_full: Sequence[Totals],
    tally: _Tally,
) -> None:
    """Look every day of one run, and add what was read to the tally."""
    wrong = naive = off = False
    seen, true = inf, 0.0
    variances = [inf] * len(lower)
    for day, arms in enumerate(zip(lower, full, strict=True)):
        interval = difference(*arms)
        if interval is None:
            continue
        true = true_lower[day].mean - true_full[day].mean
        variances[day] = sum(map(_variance, arms))
        wrong |= interval.excludes(true)
        naive |= abs(interval.estimate - true) > TWO_SIDED * sqrt(variances[day])
        saved = relative(*arms)
        off |= saved is not None and saved.excludes(true / true_lower[day].mean)
        if interval.excludes():
            seen = min(seen, day + 1)
    tally.wrong += wrong
    tally.naive += naive
    tally.relative += off
    tally.people_weeks += lower[-1].n + full[-1].n
    tally.days.append(seen)
    tally.variances.append(variances)
    tally.truths.append(true)


def _variance(totals: Totals) -> float:
    """Return the variance of the mean as a t-test has it."""
    return max(0.0, totals.sum_squares - totals.sum**2 / totals.n) / ((totals.n - 1) * totals.n)


def _without(tally: _Tally, runs: int) -> Without:
    return Without(tally.people_weeks / runs, tally.wrong / runs, tally.naive / runs)


def _with(tally: _Tally, runs: int) -> With:
    typical = np.median(tally.variances, axis=0)
    enough = np.flatnonzero((TWO_SIDED + POWER) * np.sqrt(typical) <= abs(float(np.mean(tally.truths))))
    ordered = sorted(tally.days)
    reached = [ordered[ceil(fraction * runs) - 1] for fraction in (0.1, 0.5, 0.8, 0.9)]
    return With(
        seen=sum(day < inf for day in ordered) / runs,
        days=tuple(None if day == inf else int(day) for day in reached),
        planned_days=int(enough[0]) + 1 if enough.size else None,
        wrong=tally.wrong / runs,
        wrong_relative=tally.relative / runs,
    )


if __name__ == "__main__":
    script(main)
