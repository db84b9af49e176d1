"""The simulation of people in two arms: what counts at a look, and that its figures are of the right size."""

from __future__ import annotations

import numpy as np
import pytest

from bench.learning.simulate import DAYS, METRICS, Metric, Use, simulate, simulate_numbers


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_people_weeks_count_once_their_week_is_over(metric: Metric) -> None:
    generator = np.random.default_rng(0)
    people = simulate_numbers(metric, Use(40, 3, 20, 0.1), generator)
    chosen = (generator.random((40, 3)) < 0.5).astype(float)
    totals = people.finished(people.lower, chosen)
    for day in range(3 * DAYS):
        numbers = []
        for person, weekday in enumerate(people.weekdays.argmax(axis=1)):
            for week in range(3):
                ended = week * DAYS + weekday
                last = weekday if week == 0 else -1
                if ended <= day and chosen[person, week] and people.present[person, week, last]:
                    numbers.append(people.lower[person, week, last])
        assert totals[day].n == len(numbers)
        assert totals[day].sum == pytest.approx(sum(numbers))
        assert totals[day].sum_squares == pytest.approx(sum(number**2 for number in numbers))


def test_a_large_effect_is_seen_and_none_is_not() -> None:
    steps: list[None] = []
    use = Use(300, 4, 10, effect=0.4)
    ((none, some),) = simulate(METRICS[2], use, [0.5], runs=20, seed=0, step=lambda: steps.append(None))
    assert len(steps) == 20
    assert some.seen == 1
    assert none.wrong <= 0.1
    first, middle, _, last = (day or 0 for day in some.days)
    assert 1 <= first <= middle <= last <= 4 * DAYS
    assert some.planned_days is not None
