"""Curves of training: bounded, in order, and true to what was told."""

from __future__ import annotations

import itertools
import math

import pytest

from adapters.training.user_run import Progress
from server.worker.leased.curves import MOST_POINTS, Points, Told


@pytest.mark.parametrize("count", [0, 1, 2, MOST_POINTS - 1, MOST_POINTS, MOST_POINTS + 1, 5_000])
def test_a_curve_is_bounded_ends_with_the_last_point_and_is_evenly_spaced(count: int) -> None:
    curve = Points()
    for step in range(count):
        curve.add(step, step / 2)
        assert curve.points[-1] == (step, step / 2)
    steps = [step for step, _ in curve.points]
    assert len(steps) == count if count < MOST_POINTS else MOST_POINTS / 2 <= len(steps) <= MOST_POINTS
    assert all(loss == step / 2 for step, loss in curve.points)
    gaps = {after - before for before, after in itertools.pairwise(steps[:-1])}
    assert len(gaps) <= 1
    assert steps == sorted(set(steps))


def test_a_loss_that_is_no_number_is_left_out() -> None:
    curve = Points()
    for step, loss in enumerate((1.0, math.nan, math.inf, 2.0)):
        curve.add(step, loss)
    assert curve.points == ((0, 1.0), (3, 2.0))


def test_a_step_that_is_told_twice_counts_once_and_a_held_out_loss_whenever_it_is_told() -> None:
    told = Told()
    assert (told.curve.phase, told.curve.loss, told.curve.held_out) == ("", (), ())
    for progress in (
        Progress(0, 0, 0.0, "fold 1 of 2"),
        Progress(0, 0, 0.0, "fold 1 of 2", held_out=3.0),
        Progress(1, 4, 2.5, "fold 1 of 2"),
        Progress(1, 4, 2.5, "fold 1 of 2"),
        Progress(2, 4, 2.0, "fold 1 of 2", held_out=2.25),
        Progress(2, 4, 2.0, "fold 2 of 2", held_out=3.5),
    ):
        told.take(progress)
    assert (told.curve.phase, told.curve.loss) == ("fold 2 of 2", ((1, 2.5), (2, 2.0)))
    assert told.curve.held_out == ((0, 3.0), (2, 2.25), (2, 3.5))
