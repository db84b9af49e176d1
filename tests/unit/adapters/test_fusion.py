"""Every method against its own dense formula, and the identities that must hold between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from adapters.errors import FusionError
from adapters.flat import flat_b
from adapters.fusion import fuse
from adapters.lora import ModuleShape, RowLayout
from adapters.matrix import MetaMatrix, write_matrix
from adapters.recipe import FusionMethod, FusionRecipe, Term
from bank.manifest import BankManifest, WeightRule
from bench.oracle.dense import dense_delta, dense_parts

MODULES = (ModuleShape("q", 24, 16), ModuleShape("down", 40, 24))
ANCHORS, RANK = 5, 4


def make_matrix(folder: Path, method: FusionMethod, common: bool) -> MetaMatrix:
    """A matrix of random rows, written and opened again."""
    layout = RowLayout(MODULES, RANK, method is FusionMethod.SHARED)
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
        (False, [(0, 571), (3, 429)]),
        (False, [(0, 1), (1, 499), (4, 500)]),
        (True, []),
        (True, [(1, 300), (2, 200)]),
        (True, [(0, 333), (1, 333), (4, 334)]),
    ],
)
def test_the_fused_delta_is_the_methods_own_formula(
    tmp_path: Path, method: FusionMethod, common: bool, terms: list[tuple[int, int]]
) -> None:
    matrix = make_matrix(tmp_path, method, common)
    wanted = recipe(method, common, *terms)
    fused = fuse(matrix, wanted, torch.float32)
    assert fused.rank == RANK * (1 if method is FusionMethod.SHARED else common + len(terms))
    for module in MODULES:
        assert fused.a[module.name].shape == (fused.rank, module.h_in)
        assert fused.b[module.name].shape == (module.h_out, fused.rank)
        torch.testing.assert_close(
            fused.delta(module.name), dense_delta(matrix, wanted, module).float(), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("method", list(FusionMethod))
def test_renumbering_the_anchors_changes_nothing(tmp_path: Path, method: FusionMethod) -> None:
    matrix = make_matrix(tmp_path, method, common=False)
    order = [4, 2, 0, 1, 3]
    shuffled = MetaMatrix(matrix.layout, matrix.rows[order], ANCHORS, False, matrix.shared_a)
    fused = fuse(matrix, recipe(method, False, (0, 250), (4, 750)), torch.float32)
    moved = fuse(shuffled, recipe(method, False, (0, 750), (2, 250)), torch.float32)
    for module in MODULES:
        torch.testing.assert_close(fused.delta(module.name), moved.delta(module.name), rtol=1e-4, atol=1e-4)


def test_the_formula_that_the_papers_authors_released_is_not_the_sum_of_the_anchors(tmp_path: Path) -> None:
    """`linear`, (Σ wᵢBᵢ)(Σ wᵢAᵢ), weighs each anchor by the square and adds cross terms."""
    matrix = make_matrix(tmp_path, FusionMethod.CAT, common=False)
    cat = fuse(matrix, recipe(FusionMethod.CAT, False, (0, 500), (1, 500)), torch.float32).delta("q")
    (a0, b0), (a1, b1) = (dense_parts(matrix, matrix.rows[i], MODULES[0]) for i in (0, 1))
    linear = ((b0 + b1) / 2 @ ((a0 + a1) / 2)).float()
    cross = (b0 @ a1 + b1 @ a0).float() / 4
    torch.testing.assert_close(linear, cat / 2 + cross, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(linear, cat, atol=1e-2)


def test_shared_fusion_keeps_one_a_for_all(tmp_path: Path) -> None:
    matrix = make_matrix(tmp_path, FusionMethod.SHARED, common=True)
    fused = fuse(matrix, recipe(FusionMethod.SHARED, True, (0, 400), (2, 100)))
    assert matrix.shared_a is not None
    assert fused.a["q"].untyped_storage().data_ptr() == matrix.shared_a.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (recipe(FusionMethod.SHARED, False, (0, 1000)), "fuses by `cat`"),
        (recipe(FusionMethod.CAT, True, (0, 1000)), "no common row"),
        (recipe(FusionMethod.CAT, False, (0, 400), (1, 300), (2, 300)), "at most 2 anchors"),
        (recipe(FusionMethod.CAT, False, (0, 400), (5, 600)), "anchors a00 to a04, but the recipe asks for a05"),
        (replace(recipe(FusionMethod.CAT, False, (0, 1000)), bank="1" * 8), "belongs to the bank 11111111"),
    ],
)
def test_a_recipe_the_bank_cannot_fuse_is_refused_with_the_reason(wanted: FusionRecipe, message: str) -> None:
    rule, anchors = WeightRule(anchors=2), ("",) * ANCHORS
    bank = BankManifest.model_construct(
        method=FusionMethod.CAT, common=False, anchors=anchors, weights=rule, fingerprint="0" * 64
    )
    bank.check(recipe(FusionMethod.CAT, False, (3, 400), (4, 600)))
    with pytest.raises(FusionError, match=message):
        bank.check(wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_signed_recipe_steps_from_the_common_row_in_both_directions(tmp_path: Path, dtype: torch.dtype) -> None:
    matrix = make_matrix(tmp_path, FusionMethod.SHARED, common=True)
    wanted = FusionRecipe("9f2c41d0", FusionMethod.SHARED, True, (Term(1, -2500), Term(3, 731)))
    flat = matrix.rows[matrix.common_index].double() - 2.5 * matrix.rows[1].double() + 0.731 * matrix.rows[3].double()
    fused = flat_b(matrix.layout, fuse(matrix, wanted, dtype)).double()
    torch.testing.assert_close(fused, flat, rtol=2**-8 if dtype is torch.bfloat16 else 1e-5, atol=1e-6)


def test_a_matrix_of_another_shape_is_refused(tmp_path: Path) -> None:
    make_matrix(tmp_path, FusionMethod.CAT, common=False)
    with pytest.raises(FusionError, match="the manifest says"):
        MetaMatrix.open(tmp_path / "meta_loras.safetensors", RowLayout(MODULES, RANK, False), ANCHORS + 1, False)


@pytest.mark.parametrize("method", list(FusionMethod))
def test_a_fusion_to_bf16_is_that_to_float32_rounded_once(tmp_path: Path, method: FusionMethod) -> None:
    """Their sums run in another order: a few numbers may fall to the other side of a tie, and no farther."""
    matrix = make_matrix(tmp_path, method, common=True)
    for terms in ([], [(0, 333), (4, 667)], [(1, 1), (2, 2)], [(0, 7), (1, 77), (2, 777), (3, 100), (4, 39)]):
        exact = fuse(matrix, recipe(method, True, *terms), torch.float32)  # type: ignore[arg-type]
        rounded = fuse(matrix, recipe(method, True, *terms))  # type: ignore[arg-type]
        for module in MODULES:
            for a, b in ((exact.a, rounded.a), (exact.b, rounded.b)):
                wanted, got = a[module.name].bfloat16(), b[module.name]
                assert (wanted != got).float().mean() < 0.03
                torch.testing.assert_close(got, wanted, rtol=2**-7, atol=1e-6)
