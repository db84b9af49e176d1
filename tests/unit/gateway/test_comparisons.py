"""What is said about the worth of a level, and what to do."""

from __future__ import annotations

import re

import pytest

from server.gateway.access.keys import Caller, KnownKeys
from server.gateway.experiments.arms import Level
from server.gateway.experiments.comparisons import Comparison, comparisons_of
from server.gateway.experiments.confidence import Totals
from server.gateway.experiments.tallies import Metric, sums_of
from server.store.feedback import Feedback, Outcome
from server.store.tallies import EVER, Cell, Counts
from server.store.tenants.access_keys import Policy


def totals(n: int, mean: float) -> Totals:
    """People-weeks with a standard deviation of 0.2."""
    return Totals(n, n * mean, n * (mean**2 + 0.04))


@pytest.mark.parametrize(
    ("level", "metric", "lower", "full", "words"),
    [
        ("stacked", "changed", 0.4, 0.3, r"stacked saves 25 % \(\d\d to \d\d\) of what people change: keep it"),
        (
            "stacked",
            "changed",
            0.3,
            0.4,
            r"stacked adds 33 % \(\d\d to \d\d\) to what people change: stop sending",
        ),
        ("merged", "discarded", 0.4, 0.3, r"merged saves 25 % \(.*\) of the answers that people discard: keep it"),
        (
            "merged",
            "sent",
            0.3,
            0.4,
            r"merged raises the share of answers sent as they are by 10.0 \(.*\) points: keep",
        ),
        ("merged", "up", 0.4, 0.3, r"merged lowers the share of ratings that are up by .* points: answer with `perso"),
        ("stacked", "silent", 0.4, 0.3, r"stacked lowers the share of answers without feedback by 10.0 \(.*\) points$"),
        ("stacked", "changed", 0.31, 0.3, r"text that people change: not known yet, about \d+000 more people-weeks$"),
        ("stacked", "changed", 0.3, 0.3, r"not known yet; the level changes it by -\d\.\d to \+\d\.\d points$"),
        ("stacked", "silent", 1, 1, r"not known yet; no answer has feedback, which goes to POST /users/{user_id}/fe"),
    ],
)
def test_a_result_is_a_sentence_with_what_to_do(level: str, metric: str, lower: float, full: float, words: str) -> None:
    told = Comparison(500, Level(level), Metric(metric), totals(1000, lower), totals(1000, full)).says
    assert re.search(words, told), told


def test_a_few_people_say_nothing() -> None:
    told = Comparison(500, Level.MERGED, Metric.CHANGED, totals(29, 0.9), totals(1000, 0.1))
    assert (told.difference, told.saved, told.needed) == (None, None, None)
    assert told.says.endswith("not known yet; it takes 30 people-weeks of each, 29 held out and 1000 not so far")


def test_comparisons_are_of_the_shares_of_the_newest_week() -> None:
    def cells(week: int, share: int) -> dict[Cell, tuple[float, ...]]:
        both = (week, (1.0,) * 11), (EVER, (0.0,) * 12 + (week, 1.0, 1.0))
        return {Cell(when, share, "merged", "full"): numbers for when, numbers in both}

    sums = cells(2960, 500) | cells(2961, 1000) | cells(2961, 250)
    told = list(comparisons_of(sums))
    assert [(one.share, one.level, one.metric, one.full.n) for one in told] == [
        (250, "merged", "silent", 2961),
        (1000, "merged", "silent", 2961),
    ]
    assert list(comparisons_of({})) == []


@pytest.mark.parametrize(
    ("feedback", "share"),
    [
        (
            (
                Feedback("merged", "lower", Outcome.SENT, None, None),
                Feedback("merged", "lower", Outcome.EDITED, None, 0.4),
            ),
            0.2,
        ),
        (
            (
                Feedback("merged", "lower", Outcome.SENT, None, 0.0),
                Feedback("merged", "lower", Outcome.EDITED, None, None),
            ),
            None,
        ),
    ],
)
def test_sent_counts_as_unchanged_and_unsized_edit_as_unknown(
    feedback: tuple[Feedback, ...], share: float | None
) -> None:
    counts = sum(map(Counts.of, feedback), Counts(answers=2, shares=1000, shares_squared=500_000))
    tallies = [{Cell(2960, 0, "merged", arm): counts} for arm in ("lower", "full")]
    [told] = [one for one in comparisons_of(sums_of(tallies)) if one.metric is Metric.CHANGED] or [None]
    assert (told and told.lower.mean) == share


def test_a_tenant_holds_users_out_by_its_keys_or_by_the_settings() -> None:
    keys = KnownKeys("default")
    assert [keys.holds_out("default", share) for share in (0.0, 0.1)] == [False, True]
    for name, holdout in (("own", 0.2), ("never", 0.0), ("default", None)):
        keys._callers[name] = Caller(name, name, frozenset(), Policy(holdout=holdout))
    assert [keys.holds_out(name, 0.0) for name in ("own", "never", "default", "none")] == [True, False, False, False]
    assert [keys.holds_out(name, 0.1) for name in ("own", "never", "default", "none")] == [True, False, True, True]
