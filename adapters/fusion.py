"""Fusion: from a recipe and the meta-LoRA matrix to the adapter it stands for.

With weights w, the rows' A and B (scaling folded into B) and, where it takes part, the common row c::

    cat      ΔW = B_c A_c + Σ wᵢ Bᵢ Aᵢ           A stacked, B = [B_c | w₁B₁ | …]         rank (K [+ 1])·R, exact
    shared   ΔW = (B_c + Σ wᵢ Bᵢ) A              all rows share one frozen A             rank R, exact
    linear   ΔW = B_c A_c + (Σ wᵢ Bᵢ)(Σ wᵢ Aᵢ)   what the paper's released merger does   rank R [+ R]

`linear` has cross terms Bᵢ Aⱼ and weighs each anchor by wᵢ²; it is kept for comparison. Sums run in float32 over the
mapped bf16 rows and are rounded once, to the serving dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapters.errors import FusionError
from adapters.flat import cut_b
from adapters.lora import LoraWeights
from adapters.matrix import MetaMatrix
from adapters.recipe import PER_MILLE, FusionMethod, FusionRecipe, anchor_id

PIECE = 131_072
"""Numbers summed at a time: enough work for four threads at PyTorch's grain size, and half a MiB of float32."""


def check_recipe(recipe: FusionRecipe, *, method: FusionMethod, anchors: int, max_anchors: int, common: bool) -> None:
    """Check that a bank can fuse a recipe, without touching its weights.

    Args:
        recipe: the recipe, of this bank.
        method: the bank's method.
        anchors: N, how many anchors the bank has.
        max_anchors: K, how many terms its serving rank has room for.
        common: whether it has a common row.

    Raises:
        FusionError: naming what the bank lacks.
    """
    if recipe.method is not method:
        raise FusionError(
            f"bank {recipe.bank} fuses by `{method.value}`, but the recipe asks for `{recipe.method.value}`"
        )
    if recipe.common and not common:
        raise FusionError(f"bank {recipe.bank} has no common row, but the recipe {recipe.name} asks for one")
    if len(recipe.terms) > max_anchors:
        raise FusionError(
            f"bank {recipe.bank} fuses at most {max_anchors} anchors, but the recipe has {len(recipe.terms)}"
        )
    for term in recipe.terms:
        if term.anchor >= anchors:
            last = anchor_id(anchors - 1)
            raise FusionError(
                f"bank {recipe.bank} has anchors a00 to {last}, but the recipe asks for {anchor_id(term.anchor)}"
            )


def fuse(
    matrix: MetaMatrix, recipe: FusionRecipe, dtype: torch.dtype = torch.bfloat16, *, pin_memory: bool = False
) -> LoraWeights:
    """Build the adapter that a recipe stands for, without its user adapter.

    Args:
        matrix: the bank's rows.
        recipe: a recipe that `check_recipe` accepts for this bank.
        dtype: what A and B are rounded to.
        pin_memory: whether the sum of a `shared` fusion goes to page-locked memory, for a copy to a GPU.

    Returns:
        A [R', H_in] and B [H_out, R'] per module; for `shared`, A are views of the one frozen A.
    """
    rows = [matrix.common_row] if recipe.common else []
    rows += [matrix.row(term.anchor) for term in recipe.terms]
    weights = [1.0] * recipe.common + [term.weight / PER_MILLE for term in recipe.terms]
    if recipe.method is FusionMethod.SHARED:
        return _fuse_shared(matrix, rows, weights, dtype, pin_memory)
    if recipe.method is FusionMethod.CAT:
        return _fuse_cat(matrix, rows, weights, dtype)
    return _fuse_linear(matrix, rows, weights, recipe.common, dtype)


def _fuse_shared(
    matrix: MetaMatrix, rows: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype, pin_memory: bool
) -> LoraWeights:
    """One weighted sum over whole rows; every B is a view of its result, every A a view of the frozen A."""
    flat_b = _weighted_sum(rows, weights, dtype, pin_memory)
    a = {name: a.to(dtype) for name, a in matrix.frozen_a.items()}
    return LoraWeights(matrix.layout.rank, a, cut_b(matrix.layout, flat_b))


def _fuse_cat(
    matrix: MetaMatrix, rows: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype
) -> LoraWeights:
    """Stack all A by rows and all wB by columns."""
    layout, split = matrix.layout, matrix.layout.a_numbers
    a = {
        m.name: torch.cat([row[at].view(layout.rank, m.h_in) for row in rows]).to(dtype) for m, at in layout.a_slices()
    }
    b = {
        m.name: torch.cat(
            [row[split:][at].view(m.h_out, layout.rank).float() * w for row, w in zip(rows, weights, strict=True)],
            dim=1,
        ).to(dtype)
        for m, at in layout.b_slices()
    }
    return LoraWeights(layout.rank * len(rows), a, b)


def _fuse_linear(
    matrix: MetaMatrix, rows: Sequence[torch.Tensor], weights: Sequence[float], common: bool, dtype: torch.dtype
) -> LoraWeights:
    """Average the anchors' A and B separately; the common row, if any, is stacked beside the result."""
    layout, split = matrix.layout, matrix.layout.a_numbers
    blocks = [rows[0].float()] if common else []
    if len(rows) > common:
        blocks.append(_weighted_sum(rows[common:], weights[common:], torch.float32))
    a = {
        m.name: torch.cat([block[at].view(layout.rank, m.h_in) for block in blocks]).to(dtype)
        for m, at in layout.a_slices()
    }
    b = {
        m.name: torch.cat([block[split:][at].view(m.h_out, layout.rank) for block in blocks], dim=1).to(dtype)
        for m, at in layout.b_slices()
    }
    return LoraWeights(layout.rank * len(blocks), a, b)


def _weighted_sum(
    rows: Sequence[torch.Tensor], weights: Sequence[float], dtype: torch.dtype, pin_memory: bool = False
) -> torch.Tensor:
    """Σ wᵢ rowᵢ [D], summed in float32 and rounded once to `dtype`.

    It works a piece at a time, so that the float32 sum never leaves the cache.
    """
    total = torch.empty(rows[0].shape[0], dtype=dtype, pin_memory=pin_memory)
    buffer = torch.empty(PIECE, dtype=torch.float32)
    for start in range(0, total.shape[0], PIECE):
        stop = min(start + PIECE, total.shape[0])
        piece = buffer[: stop - start].zero_()
        for row, weight in zip(rows, weights, strict=True):
            piece.add_(row[start:stop], alpha=weight)
        total[start:stop] = piece
    return total
