"""The CPU kernels: compiled once into the cache folder, or not at all; and their sum of rows against the exact one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.fusion import fuse_flat
from adapters.lora import ModuleShape, RowLayout
from adapters.matrix import MetaMatrix
from adapters.recipe import PER_MILLE, parse_recipe
from server.engine.cpu import native
from server.settings import Settings

HALF_A_PLACE = 2**-8 * 1.001
"""Of a bfloat16 number."""


@pytest.fixture(scope="module")
def compiled() -> Any:
    cache_dir = Settings().cache_dir
    assert native.build(cache_dir), "no C++ compiler: personal answers are slow here, and tests miss the kernel"
    return native.kernels(cache_dir)


def test_what_is_there_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = native.library_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setattr(native, "_compile", lambda folder: pytest.fail("compiled again"))
    assert native.build(tmp_path)


def test_another_source_or_another_pytorch_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = native.library_path(tmp_path)
    monkeypatch.setattr(native, "version", lambda package: "0.0")
    other = native.library_path(tmp_path)
    monkeypatch.setattr(native, "SOURCES", native.SOURCES[:1])
    assert len({here, other, native.library_path(tmp_path)}) == 3


@pytest.mark.parametrize("reason", ["no compiler", "a compiler that fails"])
def test_without_it_the_reason_is_logged_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reason: str
) -> None:
    def fail(folder: str) -> None:
        raise RuntimeError(f"Error building extension in {folder}")

    monkeypatch.setattr(native.shutil, "which", lambda name: None if reason == "no compiler" else f"/bin/{name}")
    monkeypatch.setattr(native, "_compile", fail)
    with caplog.at_level(logging.WARNING, "mta.engine"):
        assert not native.build(tmp_path)
    assert ("install g++" if reason == "no compiler" else "Error building extension") in caplog.text
    assert not list(tmp_path.rglob("*.so"))


@settings(max_examples=60, deadline=None)
@given(
    rank=st.sampled_from([1, 3, 8, 16]),
    h_out=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    terms=st.sampled_from(["a00*1000", "a00*350+a02*650", "c", "c+a01*300", "c+a00*250+a01*250+a02*250"]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_exact_sum_rounded_once(compiled: Any, rank: int, h_out: list[int], terms: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layout = RowLayout(tuple(ModuleShape(f"m{i}", 4, h) for i, h in enumerate(h_out)), rank, shared_a=True)
    rows = torch.randn(4, layout.row_numbers, generator=generator).bfloat16()
    a = torch.randn(layout.a_numbers, generator=generator).bfloat16()
    matrix = MetaMatrix(layout, rows, anchors=3, common=True, shared_a=a)
    recipe = parse_recipe(f"mta3:9f2c41d0:shared:{terms}")

    ours = fuse_flat(matrix, recipe, sum_across=compiled.weighted_sum_across)

    shares = [(matrix.common_index, 1.0)] * recipe.common + [(t.anchor, t.weight / PER_MILLE) for t in recipe.terms]
    exact = sum(rows[row].double() * share for row, share in shares).view(-1, rank)
    assert ours.b.t().is_contiguous() and ours.across() is ours
    torch.testing.assert_close(ours.b.double(), exact, rtol=HALF_A_PLACE, atol=1e-6)
    torch.testing.assert_close(ours.b, fuse_flat(matrix, recipe).b, rtol=2 * HALF_A_PLACE, atol=1e-6)


def test_a_row_alone_comes_back_as_it_is_what_is_not_a_number_too(compiled: Any) -> None:
    rows = torch.tensor([[1.0, -2.0, float("inf"), float("nan"), 0.5, 3.0]]).bfloat16()
    summed = compiled.weighted_sum_across(rows, [0], [1.0], 2)
    torch.testing.assert_close(summed, rows.view(3, 2).t().contiguous(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("chosen, weights, rank", [([4], [1.0], 2), ([-1], [1.0], 2), ([], [], 2), ([0], [1.0], 4)])
def test_what_is_not_there_is_refused(compiled: Any, chosen: list[int], weights: list[float], rank: int) -> None:
    with pytest.raises(RuntimeError):
        compiled.weighted_sum_across(torch.zeros(4, 6).bfloat16(), chosen, weights, rank)
