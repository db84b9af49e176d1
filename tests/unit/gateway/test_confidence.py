"""The interval of the difference between two arms: by hand, in the limit, and while somebody keeps looking."""

from __future__ import annotations

import random
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.gateway.experiments.confidence import (
    MIN_PEOPLE_WEEKS,
    SequentialInterval,
    Totals,
    difference,
    people_weeks_needed,
    relative,
)


def arm(n: int, ones: int) -> Totals:
    """Totals of n people-weeks, `ones` of them with the number 1 and the others with 0."""
    return Totals(n, ones, ones)


def found(interval: SequentialInterval | None) -> SequentialInterval:
    assert interval is not None
    return interval


def width(interval: SequentialInterval | None) -> float:
    return found(interval).high - found(interval).low


ARMS = st.integers(MIN_PEOPLE_WEEKS, 5000).flatmap(lambda n: st.builds(arm, st.just(n), st.integers(0, n)))


def test_the_interval_by_hand() -> None:
    # n = 1000 with as many ones as zeros: with a 0 and a 1 more, the variance is 250.5 / 1001 of a number.
    # 1000 · 1000 / 2000 = 500 is what the boundary is tuned for: rho² t = 2 ln 20 + ln(1 + 2 ln 20) = 7.93617,
    # and the margin is √((1 + 1 / 7.93617) · ln(8.93617 · 400)) = 3.0352 standard errors.
    seen = found(difference(arm(1000, 500), arm(1000, 500)))
    assert (seen.low, seen.estimate, seen.high) == pytest.approx((-0.06790, 0, 0.06790), abs=1e-5)


@pytest.mark.parametrize("few", [0, 1, MIN_PEOPLE_WEEKS - 1])
def test_nothing_is_said_about_few_people(few: int) -> None:
    for arms in ((arm(few, 0), arm(1000, 500)), (arm(1000, 500), arm(few, 0))):
        assert difference(*arms) is relative(*arms) is people_weeks_needed(*arms) is None


@given(ARMS, ARMS)
def test_changing_places_changes_the_sign(lower: Totals, full: Totals) -> None:
    one, two = found(difference(lower, full)), found(difference(full, lower))
    assert (one.low, one.estimate, one.high) == pytest.approx((-two.high, -two.estimate, -two.low))


def test_interval_shrinks_with_people_slower_than_for_one_look() -> None:
    sizes = (60, 300, 3000, 30_000)
    widths = [width(difference(arm(n, n // 3), arm(n, n // 3))) for n in sizes]
    assert widths == sorted(widths, reverse=True)
    one_look = [2 * 1.96 * sqrt(2 * (1 / 3) * (2 / 3) / n) for n in sizes]
    assert all(1.5 < ours / theirs < 2 for ours, theirs in zip(widths[1:], one_look[1:], strict=True))


def test_the_smaller_arm_decides() -> None:
    even, uneven = difference(arm(500, 150), arm(500, 150)), difference(arm(50, 15), arm(950, 285))
    assert 2 < width(uneven) / width(even) < 4
    more_of_the_larger = width(difference(arm(50, 15), arm(9500, 2850)))
    assert more_of_the_larger > 0.9 * width(uneven)


@pytest.mark.parametrize("ones", [0, 1000])
def test_equal_numbers_do_not_make_it_sure(ones: int) -> None:
    seen = found(difference(arm(1000, ones), arm(1000, ones)))
    assert (seen.low < -0.001, seen.estimate, seen.high > 0.001) == (True, 0, True)
    assert not found(difference(arm(30, 0), arm(600, 12))).excludes()  # 2 % against none of 30 people


def test_relative_width_is_its_first_order_at_many_people() -> None:
    lower, full = arm(100_000, 30_000), arm(100_000, 25_000)
    saved = found(relative(lower, full))
    assert saved.estimate == pytest.approx(1 / 6)
    ratio = sqrt((0.3 * 0.7 / 0.3**2 + 0.25 * 0.75 / 0.25**2) / 100_000) * 25 / 30
    plain = sqrt((0.3 * 0.7 + 0.25 * 0.75) / 100_000)
    assert width(saved) / ratio == pytest.approx(width(difference(lower, full)) / plain, rel=0.01)


@given(ARMS, ARMS)
def test_relative_difference_is_sure_when_the_difference_is(lower: Totals, full: Totals) -> None:
    saved, plain = relative(lower, full), found(difference(lower, full))
    if saved is not None:
        assert saved.low <= saved.estimate <= saved.high <= 1
        assert saved.excludes() == plain.excludes()


def test_a_share_of_what_may_be_nothing_is_not_given() -> None:
    assert relative(arm(1000, 0), arm(1000, 0)) is None
    assert relative(arm(1000, 3), arm(1000, 0)) is None
    assert found(relative(arm(1000, 500), arm(1000, 0))).high == 1


@pytest.mark.parametrize("shares", [(2000, 2000), (400, 7600)])
def test_as_many_people_weeks_as_needed_exclude_0(shares: tuple[int, int]) -> None:
    lower, full = arm(shares[0], round(shares[0] * 0.3)), arm(shares[1], round(shares[1] * 0.28))
    needed = people_weeks_needed(lower, full)
    assert needed
    for times, seen in ((0.95, False), (1.05, True)):
        grown = [round(n * times * (needed + sum(shares)) / sum(shares)) for n in shares]
        arms = (arm(grown[0], round(grown[0] * 0.3)), arm(grown[1], round(grown[1] * 0.28)))
        assert found(difference(*arms)).excludes() is seen


def test_people_weeks_needed_is_zero_if_seen_none_if_no_effect() -> None:
    assert people_weeks_needed(arm(1000, 500), arm(1000, 100)) == 0
    assert people_weeks_needed(arm(1000, 500), arm(1000, 500)) is None


def test_looking_again_and_again_rarely_errs() -> None:
    generator = random.Random(7)
    runs, ours, one_look = 300, 0, 0
    for _ in range(runs):
        wrong = naive = False
        sums = [(0, 0.0, 0.0)] * 2
        for person in range(600):
            side = generator.random() < 0.3
            (n, total, squares), value = sums[side], generator.betavariate(0.5, 1.5)
            sums[side] = n + 1, total + value, squares + value * value
            arms = [Totals(*each) for each in sums]
            seen = difference(arms[1], arms[0]) if person % 10 == 0 else None
            if seen is not None:
                wrong |= seen.excludes()
                naive |= abs(seen.estimate) > 1.96 * sqrt(sum(side.variance_of_mean for side in arms))
        ours, one_look = ours + wrong, one_look + naive
    assert ours <= 0.05 * runs
    assert one_look >= 0.15 * runs
