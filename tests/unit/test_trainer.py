"""The training loop's plain parts: rates, micro-batches, and what it refuses."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from adapters.trainer import micro_batches, rate_factor
from bank.prompt import EncodedPair


def test_the_rate_warms_up_over_a_tenth_and_falls_to_nothing() -> None:
    factors = [rate_factor(step, 30) for step in range(30)]
    assert factors[:3] == [1 / 3, 2 / 3, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.01


def test_a_single_step_is_taken_at_full_rate() -> None:
    assert rate_factor(0, 1) == 1.0


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40))
def test_micro_batches_hold_every_example_once_and_keep_to_the_limit(lengths: list[int]) -> None:
    batch = [EncodedPair(tuple(range(length)), 0) for length in lengths]
    parts = micro_batches(batch, limit=256)
    assert sorted(len(e.ids) for part in parts for e in part) == sorted(lengths)
    for part in parts:
        assert len(part) == 1 or len(part) * max(len(e.ids) for e in part) <= 256
