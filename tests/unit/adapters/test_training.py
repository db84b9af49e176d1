"""Packing examples into rows, the training rate, and which models train with quick attention and an upper half."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adapters.training.adapt_config import AdaptConfig, default_config
from adapters.training.example import Example
from adapters.training.forward.attention import use_quick_attention
from adapters.training.forward.lower_layers import upper_half
from adapters.training.forward.packing import pack
from adapters.training.trainer import rate_factor


def model(**config: Any) -> Any:
    weight = torch.nn.Parameter(torch.zeros(1))
    text = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**config))
    return SimpleNamespace(config=text, parameters=lambda: iter([weight]), dtype=torch.float32, modules=list)


def example(prompt: list[int], output: list[int]) -> Example:
    return Example((*prompt, *output), len(prompt))


ids = st.lists(st.integers(0, 3), min_size=1, max_size=30)


@given(st.lists(st.tuples(ids, ids), min_size=1, max_size=12), st.integers(1, 80))
def test_rows_hold_whole_examples_in_order_up_to_a_limit(pairs: list[tuple[list[int], list[int]]], limit: int) -> None:
    examples = [example(*pair) for pair in pairs]
    found = []
    for row in pack(model(), examples, limit):
        assert len(row.counts) == 1 or len(row.ids) <= limit
        at = 0
        for owner, count in enumerate(row.counts):
            own = [place for place, of in enumerate(row.owners) if of in (-1, owner)]
            assert [row.positions[place] for place in own] == list(range(len(own)))
            whole = tuple(row.ids[place] for place in own)
            predicted = [row.positions[place] + 1 for place in row.logit_indices[at : at + count]]
            assert predicted == list(range(len(whole) - count, len(whole)))
            assert tuple(row.targets[at : at + count]) == whole[len(whole) - count :]
            assert all(row.owners[place] == owner for place in row.logit_indices[at : at + count])
            found.append(Example(whole, len(whole) - count))
            at += count
    assert found == examples


def test_common_prefix_is_read_once_and_the_rests_stay_apart() -> None:
    (row,) = pack(model(), [example([1, 2, 3, n], [9, 9]) for n in range(4, 8)], limit=100)
    assert row.ids == [1, 2, 3, *(i for n in range(4, 8) for i in (n, 9, 9))]
    (row,) = pack(model(), [example([1, 2], [8]), example([1, 3], [9])], limit=100)
    seen = row.inputs(model())["attention_mask"][0, 0] == 0
    assert seen.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]


def test_examples_are_not_packed_where_the_mask_is_another() -> None:
    examples = [example([1, 2, 3], [4]), example([1, 2, 5], [6])]
    stateful = model()
    stateful._is_stateful = True
    for reader in (stateful, model(sliding_window=3), model(attention_chunk_size=3)):
        rows = pack(reader, examples, limit=100)
        assert [row.ids for row in rows] == [[1, 2, 3, 4], [1, 2, 5, 6]]
        assert "attention_mask" not in rows[0].inputs(reader)
    assert len(pack(model(sliding_window=4, attention_chunk_size=None), examples, limit=100)) == 1


def test_the_rate_warms_up_over_a_tenth_and_falls_to_nothing() -> None:
    factors = [rate_factor(step, 30) for step in range(30)]
    assert factors[:3] == [1 / 3, 2 / 3, 1.0]
    assert factors[2:] == sorted(factors[2:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert rate_factor(0, 1) == 1.0


def test_a_job_trains_within_the_room_that_the_bank_leaves() -> None:
    for room, rank in ((0, 1), (1, 1), (2, 2), (8, 2)):
        assert default_config(room) == AdaptConfig(rank=rank)


def eager_attention_forward(module: Any, query: Any, key: Any, value: Any) -> Any:
    """What a model of this module means by attention: something of its own."""


class Other:
    set_attn_implementation = None


def test_a_model_that_attends_in_another_way_keeps_it() -> None:
    use_quick_attention(Other())


class Plain(torch.nn.Module):
    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor: ...


class Odd(torch.nn.Module):  # takes something from the layers before it, besides hidden states
    def forward(self, hidden_states: torch.Tensor, per_layer_input: torch.Tensor) -> torch.Tensor: ...


class Many(torch.nn.Module):
    def forward(self, hidden_states): ...  # type: ignore[no-untyped-def]  # may return anything


@pytest.mark.parametrize(
    ("layers", "names", "found"),
    [
        ([Odd(), Odd()], ["layers.0.q", "layers.1.q"], None),
        ([Many(), Many()], ["layers.0.q", "layers.1.q"], None),
        ([Plain()], ["layers.0.q"], None),
        ([Plain(), Plain()], ["layers.1.q", "layers.1.k"], None),
        ([], ["layers.0.q", "other.0.q"], None),
        ([], ["layers.0.q", "q"], None),
        ([Plain()] * 9, [f"layers.{n}.{module}" for n in (1, 2, 3, 6) for module in ("q", "experts.7.up")], 3),
    ],
)
def test_upper_half_splits_adapted_layers_if_it_runs_alone(
    layers: list[torch.nn.Module], names: list[str], found: int | None
) -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(layers)
    assert upper_half(model, names) == (found and ("layers", found))
