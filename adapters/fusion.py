"""Fusion: from a recipe and the meta-LoRA matrix to the adapter it stands for. With weights w and a common row c::

    shared   ΔW = (B_c + Σ wᵢ Bᵢ) A      all rows share one frozen A         rank R
    cat      ΔW = B_c A_c + Σ wᵢ Bᵢ Aᵢ   A stacked, B = [B_c | w₁B₁ | …]     rank (K [+ 1])·R, for imported adapters

Both are exact: sums of the mapped bf16 rows run in float32 and are rounded once, to the serving dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from adapters.flat import FlatLora
from adapters.lora import LoraWeights
from adapters.matrix import MetaMatrix
from adapters.recipe import PER_MILLE, FusionMethod, FusionRecipe

PIECE = 131_072
"""Numbers summed at a time: enough work for four threads at PyTorch's grain size, and half a MiB of float32."""

BAGS = 64  # pieces that a row is summed in by one call: enough for all threads, few enough to be long
WEIGHT_PARTS = 3  # numbers in bf16 that any weight in float32 is the sum of

SumAcross = Callable[[torch.Tensor, Sequence[int], Sequence[float], int], torch.Tensor]
"""Rows [N, R·ΣH_out] bf16, which of them, their weights and R → Σ wᵢ Bᵢ along H_out, [R, ΣH_out] bf16."""


def fuse(matrix: MetaMatrix, recipe: FusionRecipe, dtype: torch.dtype = torch.bfloat16) -> LoraWeights:
    """`fuse_flat`, module by module; of `shared`, A are views of the one frozen A."""
    return fuse_flat(matrix, recipe, dtype).weights()


def fuse_flat(
    matrix: MetaMatrix,
    recipe: FusionRecipe,
    dtype: torch.dtype = torch.bfloat16,
    *,
    sum_across: SumAcross | None = None,
) -> FlatLora:
    """Build the adapter that a recipe, which its bank has checked, stands for, without its user adapter.

    It takes a handful of PyTorch's operations, whatever the number of modules: a thread that fuses beside a running
    model needs Python's lock only between them. `sum_across` replaces PyTorch for the B of `shared` fusions to bf16.
    """
    rows = [matrix.common_index] if recipe.common else []
    rows += [term.anchor for term in recipe.terms]
    weights = [1.0] * recipe.common + [term.weight / PER_MILLE for term in recipe.terms]
    layout = matrix.layout
    if recipe.method is FusionMethod.SHARED:
        if sum_across is not None and dtype is torch.bfloat16:
            b = sum_across(matrix.rows, rows, weights, layout.rank).t()
        else:
            b = _weighted_sum(matrix.rows, rows, weights, dtype).view(-1, layout.rank)
        return FlatLora(layout.modules, (matrix.frozen.to(dtype),), b)
    split = layout.a_numbers
    blocks = [matrix.rows[row] for row in rows]
    b_blocks = [block[split:].view(-1, layout.rank).float() * w for block, w in zip(blocks, weights, strict=True)]
    # A is copied: what is written to a slot later must not have to be read from the file then.
    a = tuple(block[:split].to(dtype, copy=True) for block in blocks)
    return FlatLora(layout.modules, a, torch.cat(b_blocks, dim=1).to(dtype))


def _weighted_sum(
    rows: torch.Tensor, chosen: Sequence[int], weights: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """Σ wᵢ rowᵢ [D] of some rows of [N, D] bf16, summed in float32 and rounded once to `dtype`."""
    if dtype is torch.bfloat16 and rows.dtype is torch.bfloat16:
        return _weighted_bag(rows, chosen, weights)
    total = torch.empty(rows.shape[1], dtype=dtype)
    for piece, parts in zip(
        torch.split(total, PIECE), torch.split(rows, PIECE, dim=1), strict=True
    ):  # the sum stays in the cache
        summed = torch.zeros(piece.shape)
        for row, weight in zip(chosen, weights, strict=True):
            summed.add_(parts[row], alpha=weight)
        piece.copy_(summed)
    return total


def _weighted_bag(rows: torch.Tensor, chosen: Sequence[int], weights: Sequence[float]) -> torch.Tensor:
    """The same in bf16 by one call of PyTorch: rows' pieces are entries of a table, a piece of the sum is a bag.

    Bags add in float32, but their weights are bf16, so each weight comes as a sum of three.
    """
    pieces = math.gcd(rows.shape[1], BAGS)
    entries = [(row * pieces, part) for row, w in zip(chosen, weights, strict=True) for part in _in_bf16(w)]
    bags = torch.arange(pieces)[:, None] + torch.tensor([entry for entry, _ in entries])
    shares = torch.tensor([part for _, part in entries], dtype=torch.bfloat16).expand(pieces, -1).contiguous()
    table = rows.view(rows.shape[0] * pieces, -1)
    summed: torch.Tensor = torch.nn.functional.embedding_bag(bags, table, mode="sum", per_sample_weights=shares)
    return summed.view(-1)


def _in_bf16(weight: float) -> tuple[float, ...]:
    """One to three numbers of 8 significant bits that sum to a weight, to the precision of float32."""
    parts: list[float] = []
    while weight and len(parts) < WEIGHT_PARTS:
        mantissa, exponent = math.frexp(weight)
        parts.append(math.ldexp(round(mantissa * 256), exponent - 8))
        weight -= parts[-1]
    return tuple(parts)
