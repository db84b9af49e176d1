"""Every method against its own dense formula, and the identities that must hold between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.errors import FusionError
from adapters.fusion import fuse
from adapters.lora import ModuleShape, RowLayout
from adapters.matrix import MetaMatrix, write_matrix
from adapters.recipe import FusionMethod, FusionRecipe, Term
from bank.manifest import BankManifest, WeightRule
from bench.oracle.dense import dense_delta, dense_parts

MODULES = (ModuleShape("q", 24, 16), ModuleShape("down", 40, 24))
ANCHORS, RANK = 5, 4
CAT, SHARED = FusionMethod.CAT, FusionMethod.SHARED


def make_matrix(folder: Path, method: FusionMethod, common: bool) -> MetaMatrix:
    layout = RowLayout(MODULES, RANK, method is SHARED)
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randn(layout.row_numbers, generator=generator) for _ in range(ANCHORS + common)]
    shared_a = torch.randn(layout.a_numbers, generator=generator) if layout.shared_a else None
    path = folder / "meta_loras.safetensors"
    write_matrix(path, layout, rows, shared_a)
    return MetaMatrix.open(path, layout, ANCHORS, common)


def recipe(method: FusionMethod, common: bool, *terms: tuple[int, int]) -> FusionRecipe:
    return FusionRecipe("0" * 8, method, common, tuple(Term(a, w) for a, w in terms))


@pytest.mark.parametrize("method", list(FusionMethod))
@pytest.mark.parametrize(
    ("common", "terms"),
    [
        (False, [(2, 1000)]),
        (False, [(0, 1), (1, 499), (4, 500)]),
        (True, []),
        (True, [(1, -2500), (3, 731)]),
        (True, [(0, 7), (1, 77), (2, 777), (3, 100), (4, 39)]),
    ],
)
def test_the_fused_delta_is_the_methods_own_formula_and_in_bf16_it_is_rounded_once(
    tmp_path: Path, method: FusionMethod, common: bool, terms: list[tuple[int, int]]
) -> None:
    matrix, wanted = make_matrix(tmp_path, method, common), recipe(method, common, *terms)
    fused, rounded = fuse(matrix, wanted, torch.float32), fuse(matrix, wanted)
    assert fused.rank == RANK * (1 if method is SHARED else common + len(terms))
    for module in MODULES:
        name, dense = module.name, dense_delta(matrix, wanted, module).float()
        assert fused.a[name].shape == (fused.rank, module.h_in)
        assert fused.b[name].shape == (module.h_out, fused.rank)
        torch.testing.assert_close(fused.delta(name), dense, rtol=1e-4, atol=1e-4)
        for exact, got in ((fused.a[name], rounded.a[name]), (fused.b[name], rounded.b[name])):
            # Sums run in another order: a few numbers may fall to the other side of a tie, and no farther.
            assert (exact.bfloat16() != got).float().mean() < 0.03
            torch.testing.assert_close(got, exact.bfloat16(), rtol=2**-7, atol=1e-6)
    if matrix.shared_a is not None:  # one A for all
        assert rounded.a["q"].untyped_storage().data_ptr() == matrix.shared_a.untyped_storage().data_ptr()


def test_the_formula_that_the_papers_authors_released_is_not_the_sum_of_the_anchors(tmp_path: Path) -> None:
    """`linear`, (Σ wᵢBᵢ)(Σ wᵢAᵢ), weighs each anchor by the square and adds cross terms."""
    matrix = make_matrix(tmp_path, CAT, common=False)
    cat = fuse(matrix, recipe(CAT, False, (0, 500), (1, 500)), torch.float32).delta("q")
    (a0, b0), (a1, b1) = (dense_parts(matrix, matrix.rows[i], MODULES[0]) for i in (0, 1))
    linear = ((b0 + b1) / 2 @ ((a0 + a1) / 2)).float()
    cross = (b0 @ a1 + b1 @ a0).float() / 4
    torch.testing.assert_close(linear, cat / 2 + cross, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(linear, cat, atol=1e-2)


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (recipe(SHARED, False, (0, 1000)), "fuses by `cat`"),
        (recipe(CAT, True, (0, 1000)), "no common row"),
        (recipe(CAT, False, (0, 400), (1, 300), (2, 300)), "at most 2 anchors"),
        (recipe(CAT, False, (0, 400), (5, 600)), "anchors a00 to a04, but the recipe asks for a05"),
        (replace(recipe(CAT, False, (0, 1000)), bank="1" * 8), "belongs to the bank 11111111"),
    ],
)
def test_a_recipe_the_bank_cannot_fuse_is_refused_with_the_reason(wanted: FusionRecipe, message: str) -> None:
    rule, anchors = WeightRule(anchors=2), ("",) * ANCHORS
    bank = BankManifest.model_construct(method=CAT, common=False, anchors=anchors, weights=rule, fingerprint="0" * 64)
    bank.check(recipe(CAT, False, (3, 400), (4, 600)))
    with pytest.raises(FusionError, match=message):
        bank.check(wanted)


def test_a_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    make_matrix(tmp_path, CAT, common=False)
    with pytest.raises(FusionError, match="the manifest says"):
        MetaMatrix.open(tmp_path / "meta_loras.safetensors", RowLayout(MODULES, RANK, False), ANCHORS + 1, False)
