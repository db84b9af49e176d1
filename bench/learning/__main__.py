"""Look every day at simulated people: wrong findings without an effect, and days until an effect is seen.

    python -m bench.learning --out docs/figures/worth.json

Without an effect, the table gives the share of runs in which an interval excludes 0 at some look: the server's
interval, and a t-interval. With an effect, it gives the days until the server's interval excludes 0 in 10, 50, 80 and
90 % of the runs, beside the days of a t-test with one look and a power of 80 %, and the share of runs in which an
interval ever excludes the true effect.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import Progress

from bench import script
from bench.learning.simulate import METRICS, Use, simulate
from bench.page.report import Figures, tabulate

PEOPLE, HOLDOUTS = (1000, 10_000), (0.05, 0.5)
WITHOUT = ("people", "number", "lower arm", "people-weeks", "ever wrong", "t-interval")
WITH = ("people", "number", "lower arm", "seen", "10 %", "50 %", "80 %", "90 %", "t-test", "ever wrong", "relative")


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
                found = simulate(metric, use, holdout, runs=runs, seed=seed, step=step)
                for share, (none, some) in zip(holdout, found, strict=True):
                    about = [size, metric.name, share]
                    without.append([*about, round(none.people_weeks), none.wrong, none.wrong_naive])
                    having.append([*about, some.seen, *some.days, some.planned_days, some.wrong, some.wrong_relative])
    title = f"{runs:,} runs, {weeks} weeks, a look each day"
    tables = [
        Figures(f"No effect: {title}", WITHOUT, without),
        Figures(f"A relative effect of {effect:.0%}, days until seen: {title}", WITH, having),
    ]
    tabulate(tables, out)


if __name__ == "__main__":
    script(main)
