"""The simulation of people in two arms, and the table of `evaluation.studies.learning`."""

from __future__ import annotations

import numpy as np
import pytest

from evaluation.studies.holdout import DAYS, METRICS, Metric, Use, simulate, simulate_numbers
from evaluation.studies.learning import WAYS, Learner, picture, table

TEXTS = [("a question", "an answer")]
LOWER = dict(zip(WAYS, (0.0, 0.25, 0.75, 1.0, 1.125, 1.25), strict=True))


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


def person(name: str, texts: int, step: float) -> Learner:
    """Somebody whose loss falls by `step` a text, and by `LOWER` in each way."""
    learner = Learner(name, TEXTS * texts)
    for way in WAYS:
        learner.losses[way] = [4.0 - step * place - LOWER[way] for place in range(texts)]
    learner.levels = ["base", *["merged"] * (texts - 1)]
    return learner


def test_losses_are_means_over_and_differences_within_people() -> None:
    people = [person("ada", 16, 0.1), person("bob", 16, 0.1), person("cai", 6, 0.2)]
    lines = {str(line[0]): line[1:] for line in table(people).lines}
    assert list(lines) == ["1 to 3", "4 to 7", "8 to 11", "12 to 15"]
    assert lines["8 to 11"][:6] == ("3.050", "2.800", "2.300", "2.050", "1.925", "1.800")
    assert lines["8 to 11"][-1] == "100% merged"
    assert lines["4 to 7"][0] == "3.333"  # ada and bob 3.45, cai, of whom there are two such texts, 3.1
    assert lines["12 to 15"][0] == "2.650"  # without cai
    for learnt, people_of_it in (("1 to 3", 3), ("4 to 7", 3), ("12 to 15", 2)):
        common, _, _, served, with_history, _ = map(str, lines[learnt][6:12])
        assert (common[:7], served[:7], with_history[:7]) == ("-0.2500", "-0.5000", "-0.1250")
        assert f"{people_of_it} users" in served
    (axis,) = picture(people).axes
    served, with_history, _ = axis.get_lines()
    assert list(served.get_xdata()) == list(range(1, 16))
    assert [round(float(line.get_ydata()[-1]), 4) for line in (served, with_history)] == [-0.5, -0.125]
