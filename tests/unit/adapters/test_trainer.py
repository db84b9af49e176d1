"""The training loop's rates."""

from __future__ import annotations

from adapters.training.trainer import rate_factor


def test_the_rate_warms_up_over_a_tenth_and_falls_to_nothing() -> None:
    factors = [rate_factor(step, 30) for step in range(30)]
    assert factors[:3] == [1 / 3, 2 / 3, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.01


def test_a_single_step_is_taken_at_full_rate() -> None:
    assert rate_factor(0, 1) == 1.0
