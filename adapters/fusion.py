"""Fuse rows of the meta-LoRA matrix into the adapter of a recipe. With weights w and a common row c::

    shared   ΔW = (B_c + Σ wᵢ Bᵢ) A      all rows share one frozen A         rank R
    cat      ΔW = B_c A_c + Σ wᵢ Bᵢ Aᵢ   A stacked, B = [B_c | w₁B₁ | …]     rank (K [+ 1])·R, for imported adapters

Both methods sum the mapped bf16 rows in float32 and round once, to the serving dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from adapters.flat import FlatLora
from adapters.lora import LoraWeights
from adapters.matrix import MetaMatrix
from adapters.recipe import FusionMethod, FusionRecipe

CHUNK_NUMBERS = 131_072  # numbers summed at a time: work for four threads at PyTorch's grain size, half a MiB
MAX_BAGS = 64  # maximum number of chunks per row in one `embedding_bag` call: enough for all threads
WEIGHT_PARTS = 3  # number of bf16 values whose sum equals any float32 weight

TransposedSum = Callable[..., torch.Tensor]
"""Rows [N, R·ΣH_out] bf16, row indices, weights, R and perhaps `MetaMatrix.packed` → Σ wᵢ Bᵢᵀ, [R, ΣH_out] bf16."""


def fuse(matrix: MetaMatrix, recipe: FusionRecipe, dtype: torch.dtype = torch.bfloat16) -> LoraWeights:
    """Return the result of `fuse_flat` per module; for method `shared`, every A is a view of the frozen A."""
    return fuse_flat(matrix, recipe, dtype).weights()


def fuse_flat(
    matrix: MetaMatrix,
    recipe: FusionRecipe,
    dtype: torch.dtype = torch.bfloat16,
    *,
    sum_transposed: TransposedSum | None = None,
) -> FlatLora:
    """Build the adapter of a recipe that its bank has checked, without the user adapter.

    A few operations serve all modules, so that a thread that fuses beside a running model rarely needs the GIL.
    `sum_transposed` replaces PyTorch for the B of `shared` fusions to bf16.
    """
    rows, weights = zip(*recipe.rows(matrix.common_index if recipe.common else 0), strict=True)
    layout = matrix.layout
    if recipe.method is FusionMethod.SHARED:
        if sum_transposed is not None and dtype is torch.bfloat16:
            b = sum_transposed(matrix.rows, rows, weights, layout.rank, *(matrix.packed or ())).t()
        else:
            b = weighted_sum(matrix.rows, rows, weights, dtype).view(-1, layout.rank)
        return FlatLora(layout.modules, (matrix.frozen.to(dtype),), b)
    split = layout.a_numbers
    blocks = [matrix.rows[row] for row in rows]
    b_blocks = [block[split:].view(-1, layout.rank).float() * w for block, w in zip(blocks, weights, strict=True)]
    # Copy A now, so that writing the slot later does not read from the file.
    a = tuple(block[:split].to(dtype, copy=True) for block in blocks)
    return FlatLora(layout.modules, a, torch.cat(b_blocks, dim=1).to(dtype))


def weighted_sum(
    rows: torch.Tensor, chosen: Sequence[int], weights: Sequence[float], dtype: torch.dtype
) -> torch.Tensor:
    """Return Σ wᵢ rowᵢ [D] over the chosen rows of [N, D] bf16, summed in float32 and rounded once to `dtype`."""
    if dtype is torch.bfloat16:
        return _weighted_bag(rows, chosen, weights)
    total = torch.empty(rows.shape[1], dtype=dtype)
    pieces = torch.split(total, CHUNK_NUMBERS)  # small enough for the sum to stay in the cache
    for piece, parts in zip(pieces, torch.split(rows, CHUNK_NUMBERS, dim=1), strict=True):
        summed = torch.zeros(piece.shape)
        for row, weight in zip(chosen, weights, strict=True):
            summed.add_(parts[row], alpha=weight)
        piece.copy_(summed)
    return total


def _weighted_bag(rows: torch.Tensor, chosen: Sequence[int], weights: Sequence[float]) -> torch.Tensor:
    """Sum in bf16 with one `embedding_bag` call: chunks of rows are table entries, and bags accumulate in float32."""
    pieces = math.gcd(rows.shape[1], MAX_BAGS)
    entries = [(row * pieces, part) for row, w in zip(chosen, weights, strict=True) for part in _bf16_parts(w)]
    bags = torch.arange(pieces)[:, None] + torch.tensor([entry for entry, _ in entries])
    shares = torch.tensor([part for _, part in entries], dtype=torch.bfloat16).expand(pieces, -1).contiguous()
    table = rows.view(rows.shape[0] * pieces, -1)
    return torch.nn.functional.embedding_bag(bags, table, mode="sum", per_sample_weights=shares).view(-1)


def _bf16_parts(weight: float) -> tuple[float, ...]:
    """Split a weight into up to three bf16 values that sum to the weight with float32 precision."""
    parts: list[float] = []
    while weight and len(parts) < WEIGHT_PARTS:
        mantissa, exponent = math.frexp(weight)
        parts.append(math.ldexp(round(mantissa * 256), exponent - 8))
        weight -= parts[-1]
    return tuple(parts)
