"""The compiled sum of a bank's rows against the exact one and PyTorch's, over ranks, widths and weights."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.fusion import fuse_flat
from adapters.layout import RowLayout
from adapters.lora import ModuleShape
from adapters.matrix import MetaMatrix
from adapters.recipe import PER_MILLE, parse_recipe
from server.engine.fusing.kernels.native import Kernels, kernels
from server.settings import Settings

HALF_A_PLACE = 2**-8 * 1.001
"""Of a bfloat16 number."""


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    found = kernels(Settings().cache_dir)
    assert found is not None, "no C++ compiler"
    return found


@settings(max_examples=60, deadline=None)
@given(
    rank=st.sampled_from([1, 3, 8, 16]),
    h_out=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    terms=st.sampled_from(["a00*1000", "a00*350+a02*650", "c", "c+a01*300", "c+a00*250+a01*250+a02*250"]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_exact_sum_rounded_once(
    compiled: Kernels, rank: int, h_out: list[int], terms: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = RowLayout(tuple(ModuleShape(f"m{i}", 4, h) for i, h in enumerate(h_out)), rank, shared_a=True)
    rows = torch.randn(4, layout.row_numbers, generator=generator).bfloat16()
    a = torch.randn(layout.a_numbers, generator=generator).bfloat16()
    matrix = MetaMatrix(layout, rows, anchors=3, common=True, shared_a=a)
    recipe = parse_recipe(f"mta1:9f2c41d0:shared:{terms}")

    ours = fuse_flat(matrix, recipe, sum_across=compiled.weighted_sum_across)

    shares = [(matrix.common_index, 1.0)] * recipe.common + [(t.anchor, t.weight / PER_MILLE) for t in recipe.terms]
    exact = sum(rows[row].double() * share for row, share in shares).view(-1, rank)
    assert ours.b.t().is_contiguous() and ours.across() is ours
    torch.testing.assert_close(ours.b.double(), exact, rtol=HALF_A_PLACE, atol=1e-6)
    torch.testing.assert_close(ours.b, fuse_flat(matrix, recipe).b, rtol=2 * HALF_A_PLACE, atol=1e-6)


def test_a_row_alone_comes_back_as_it_is_what_is_not_a_number_too(compiled: Kernels) -> None:
    rows = torch.tensor([[1.0, -2.0, float("inf"), float("nan"), 0.5, 3.0]]).bfloat16()
    summed = compiled.weighted_sum_across(rows, [0], [1.0], 2)
    torch.testing.assert_close(summed, rows.view(3, 2).t().contiguous(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("chosen, weights, rank", [([4], [1.0], 2), ([-1], [1.0], 2), ([], [], 2), ([0], [1.0], 4)])
def test_what_is_not_there_is_refused(compiled: Kernels, chosen: list[int], weights: list[float], rank: int) -> None:
    with pytest.raises(RuntimeError):
        compiled.weighted_sum_across(torch.zeros(4, 6).bfloat16(), chosen, weights, rank)
