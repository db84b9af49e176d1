"""How sure a mean over users is: intervals, sign flips, and Holm's correction, against what is known."""

from __future__ import annotations

import warnings
from itertools import product

import numpy as np
import pytest
from scipy import stats

from bank.evaluation.intervals import Interval, compare_with_one, holm, over_users, sign_flip_p
from bank.evaluation.run import Record
from bank.evaluation.summary import CAPTION, markdown, summarise, tables
from bank.items.tasks import get_task

TASK = get_task("movie_rating")


def test_over_few_skewed_users_the_interval_holds_the_mean_more_often_than_a_percentile_interval() -> None:
    samples, mean = np.random.default_rng(0).lognormal(size=(300, 10)), np.exp(0.5)
    drawn = np.random.default_rng(1).integers(0, 10, (2_000, 10))
    low, high = np.percentile(samples[:, drawn].mean(axis=2), (2.5, 97.5), axis=1)
    ours = [over_users(sample) for sample in samples]
    held = np.mean([interval.low <= mean <= interval.high for interval in ours])
    assert held >= np.mean((low <= mean) & (mean <= high)) + 0.01


def test_an_interval_is_the_same_every_time_and_changes_sides_with_the_differences() -> None:
    differences = np.random.default_rng(2).exponential(size=12)
    found, other = over_users(differences), over_users(-differences)
    assert found == over_users(differences)
    assert (found.mean, found.n) == (pytest.approx(differences.mean()), 12)
    assert (found.low, found.high) == pytest.approx((-other.high, -other.low))
    assert found.mean - found.low < found.high - found.mean  # the long tail is on the right


@pytest.mark.parametrize("differences", [[0.25], [0.0] * 5, [0.3 - 0.1, 0.2, 0.7 - 0.5]])
def test_where_nothing_can_be_resampled_the_interval_is_the_mean(differences: list[float]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = over_users(differences)
    assert found == Interval(found.mean, found.mean, found.mean, len(differences))
    assert found.mean == pytest.approx(differences[0])


def test_sign_flips_of_few_users_are_counted_exactly_and_of_many_agree_with_the_t_test() -> None:
    sums = np.array(list(product((-1, 1), repeat=5))) @ (1, -2, 3, 4, 5)
    extreme = float(np.mean(np.abs(sums) >= 11))
    assert sign_flip_p([[1, -2, 3, 4, 5], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]) == pytest.approx([extreme, 2 / 32, 1.0])
    assert sign_flip_p([[0.5]]) == [1.0]
    many = np.random.default_rng(6).normal(0.3, 1.0, 60)
    assert sign_flip_p([many])[0] == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.01)


def test_holm_multiplies_the_smallest_by_all_and_never_goes_down() -> None:
    # 0.01 × 4, 0.02 × 3, then 0.03 × 2 = 0.06 and 0.04 × 1, which is raised to the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.01]) == pytest.approx([0.6, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_a_difference_that_is_sure_alone_is_not_among_many() -> None:
    chance = np.random.default_rng(5)
    gain = chance.normal(-0.8, 1.0, 12)
    alone = compare_with_one({"gain": gain})["gain"]
    assert alone.significant and alone.high < 0
    noise = {f"noise {n}": chance.normal(0, 1, 12) for n in range(9)}
    among = compare_with_one({"gain": gain, **noise})["gain"]
    assert (among.low, among.high) == (alone.low, alone.high)
    assert not among.significant
    assert among.p == pytest.approx(10 * (alone.p or 0))
    assert "*" in str(alone) and "*" not in str(among)


def _records(losses: dict[str, list[float]]) -> list[Record]:
    return [
        Record("key", f"u{user}", f"q{user}", method, 0, loss, None, "3")
        for method, found in losses.items()
        for user, loss in enumerate(found)
    ]


def test_a_column_is_tested_together_without_the_points_of_curves() -> None:
    chance = np.random.default_rng(3)
    losses = {name: list(chance.normal(1, 0.3, 10)) for name in ("task", "mean", "merged", "merged@k2", "base")}
    losses["stacked"] = losses["merged"][:4]
    rows = {row.method: row for row in summarise(_records(losses), TASK)}
    column = ("mean", "merged", "base")
    p = sign_flip_p([np.subtract(losses[name], losses["task"]) for name in column])
    assert [rows[name].against["task"].p for name in column] == pytest.approx(holm(p))
    assert rows["merged@k2"].against["task"].p is None
    assert rows["stacked"].against["task"].p is None
    assert rows["merged"].against["merged@k2"].p is None
    assert rows["stacked"].against["merged"] == Interval(0, 0, 0, 4)


def test_a_table_is_bold_where_a_difference_is_sure_and_says_what_that_means() -> None:
    chance = np.random.default_rng(4)
    task = chance.normal(1, 0.3, 12)
    losses = {"task": task, "merged": task - 0.3 + chance.normal(0, 0.1, 12), "own": task + chance.normal(0, 0.1, 12)}
    records = _records({name: list(found) for name, found in losses.items()})
    lines = markdown(tables(summarise(records, TASK), records, TASK)).splitlines()
    head, merged, own = (
        next(line for line in lines if line.startswith(f"| {name} ")).split(" | ")
        for name in ("method", "merged", "own")
    )
    against_task = head.index("loss against task")
    assert merged[against_task].startswith("**-0.")
    assert "**" not in own[against_task]
    assert lines[-1] == CAPTION
