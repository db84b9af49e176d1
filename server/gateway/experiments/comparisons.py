"""Whether personalisation is worth it: each level against the one below, from the sums of all finished weeks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from server.gateway.experiments.arms import Arm, Level
from server.gateway.experiments.confidence import (
    MIN_PEOPLE_WEEKS,
    SequentialInterval,
    Totals,
    difference,
    people_weeks_needed,
    relative,
)
from server.gateway.experiments.tallies import Metric
from server.store.tallies import EVER, Cell, Counts

_LEVELS = (Level.STACKED, Level.MERGED)
_KNOWN = 0.95
"""Share of the answers sent or edited of which it must be known how much was changed: the others are edited ones, and a
mean without them would flatter whoever edits more."""
_HOPELESS = 20  # times as many people-weeks as there are: nobody waits for these
_SHARE_OF = {
    Metric.CHANGED: "text that people change",
    Metric.SENT: "answers sent as they are",
    Metric.DISCARDED: "discarded answers",
    Metric.UP: "ratings that are up",
    Metric.SILENT: "answers without feedback",
}
_SAVED = {Metric.CHANGED: "what people change", Metric.DISCARDED: "the answers that people discard"}
_GOOD = {Metric.CHANGED: 1, Metric.DISCARDED: 1, Metric.SENT: -1, Metric.UP: -1}  # sign of `lower` less `full`
_INSTEAD = {
    Level.STACKED: "stop sending samples to adapt, or answer with `personalize: merged`",
    Level.MERGED: "answer with `personalize: none`, or build a bank from more people",
}
BEGIN = (
    "nothing is compared yet: hold out a share of users with MTA_HOLDOUT=0.05 or `mta keys create NAME --holdout 0.05` "
    "and send feedback on answers to POST /users/{user_id}/feedback"
)
COUNTING = "nothing is known yet: people are counted once their week is over, a day after its end, by Tuesday 0:00 UTC"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One level against the one below by one metric; all numbers are shares, 0 to 1."""

    share: int  # of people held out, per `SHARE_UNIT`
    level: Level
    metric: Metric
    lower: Totals
    full: Totals

    @property
    def difference(self) -> SequentialInterval | None:
        return difference(self.lower, self.full)

    @property
    def saved(self) -> SequentialInterval | None:
        """Return the difference over `lower`, for metrics of what is to be saved."""
        return relative(self.lower, self.full) if self.metric in _SAVED else None

    @property
    def needed(self) -> int | None:
        return people_weeks_needed(self.lower, self.full)

    @property
    def says(self) -> str:
        found, saved, needed = self.difference, self.saved, self.needed
        about = f"{self.level}, {_SHARE_OF[self.metric]}: not known yet"
        if self.metric is Metric.SILENT and self.lower.sum + self.full.sum == self.lower.n + self.full.n:
            return f"{about}; no answer has feedback, which goes to POST /users/{{user_id}}/feedback"
        if found is None:
            so_far = f"{self.lower.n} held out and {self.full.n} not so far"
            return f"{about}; it takes {MIN_PEOPLE_WEEKS} people-weeks of each, {so_far}"
        if not found.excludes():
            if needed is None or needed > _HOPELESS * (self.lower.n + self.full.n):
                return f"{about}; the level changes it by {-100 * found.high:+.1f} to {-100 * found.low:+.1f} points"
            return f"{about}, about {_rounded(needed)} more people-weeks"
        better = found.estimate * _GOOD.get(self.metric, 0)
        advice = f": {'keep it' if better > 0 else _INSTEAD[self.level]}" if better else ""
        if saved is None:
            verb = "lowers" if found.estimate > 0 else "raises"
            return f"{self.level} {verb} the share of {_SHARE_OF[self.metric]} by {_shown(found, 1)} points{advice}"
        verb, part = ("saves", "of") if better > 0 else ("adds", "to")
        return f"{self.level} {verb} {_shown(saved, 0, ' %')} {part} {_SAVED[self.metric]}{advice}"


def weeks_of(sums: Mapping[Cell, Sequence[float]]) -> list[tuple[Cell, int, Counts]]:
    """Return the cells of all weeks with the number of people and what happened to their answers, newest first."""
    cells = sorted((cell for cell in sums if cell.week != EVER), key=lambda cell: (-cell.week, cell.field))
    return [(cell, int(sums[cell][0]), Counts(*sums[cell][1:])) for cell in cells]


def comparisons_of(sums: Mapping[Cell, Sequence[float]]) -> Iterator[Comparison]:
    """Yield the comparisons by the shares held out in the newest week; another share begins another comparison."""
    newest = max((cell.week for cell in sums), default=EVER)
    for share in sorted({cell.share for cell in sums if cell.week == newest}):
        for level in _LEVELS:
            arms = Cell(EVER, share, level, Arm.LOWER), Cell(EVER, share, level, Arm.FULL)
            lower, full = (_totals(sums.get(cell, ())) for cell in arms)
            for metric in Metric:
                if metric is Metric.CHANGED and not all(_is_known(sums, cell) for cell in arms):
                    continue
                if metric in lower or metric in full:
                    of_both = lower.get(metric, Totals()), full.get(metric, Totals())
                    yield Comparison(share, level, metric, *of_both)


def _is_known(sums: Mapping[Cell, Sequence[float]], ever: Cell) -> bool:
    """Whether the weeks that are kept know how much of nearly every answer was changed."""
    weeks = [Counts(*sums[cell][1:]) for cell in sums if cell.week != EVER and replace(cell, week=EVER) == ever]
    total = sum(weeks, Counts())
    return total.measured >= _KNOWN * (total.sent + total.edited)


def _totals(numbers: Sequence[float]) -> dict[Metric, Totals]:
    triples = zip(Metric, numbers[::3], numbers[1::3], numbers[2::3], strict=False)
    return {metric: Totals(int(n), total, squares) for metric, n, total, squares in triples if n}


def _shown(found: SequentialInterval, digits: int, unit: str = "") -> str:
    """Return the sizes of an estimate and of its interval's ends, the smaller one first, in hundredths."""
    ends = sorted((abs(found.low), abs(found.high)))
    estimate, low, high = (f"{100 * size:.{digits}f}" for size in (abs(found.estimate), *ends))
    return f"{estimate}{unit} ({low} to {high})"


def _rounded(count: int) -> int:
    """Return a count with one or two digits that mean something."""
    return round(count, min(0, 2 - len(str(count))))
