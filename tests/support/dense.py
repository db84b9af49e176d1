"""The oracle: computes recipes on dense float64 matrices. It shares no code with `adapters/fusion.py`.

The tests compare a running vLLM with Hugging Face models that have ΔW added to their weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch

from adapters.lora import ModuleShape
from adapters.matrix import MetaMatrix
from adapters.recipe import FusionRecipe
from adapters.user_adapter import UserAdapter


def dense_parts(matrix: MetaMatrix, row: torch.Tensor, module: ModuleShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut A [R, H_in] and B [H_out, R] of one module out of a row, in float64."""
    modules, rank = matrix.layout.modules, matrix.layout.rank
    at = modules.index(module)
    a_starts = list(accumulate((rank * m.h_in for m in modules), initial=0))
    b_starts = list(accumulate((rank * m.h_out for m in modules), initial=0))
    if matrix.shared_a is not None:
        flat_a, flat_b = matrix.shared_a, row
    else:
        flat_a, flat_b = row[: a_starts[-1]], row[a_starts[-1] :]
    a = flat_a[a_starts[at] : a_starts[at + 1]].double().view(rank, module.h_in)
    b = flat_b[b_starts[at] : b_starts[at + 1]].double().view(module.h_out, rank)
    return a, b


def dense_delta(matrix: MetaMatrix, recipe: FusionRecipe, module: ModuleShape) -> torch.Tensor:
    """Return ΔW [H_out, H_in] of one module in float64, summed term by term."""
    delta = torch.zeros(module.h_out, module.h_in, dtype=torch.float64)
    if recipe.common:
        a, b = dense_parts(matrix, matrix.rows[matrix.anchors], module)
        delta += b @ a
    parts = [(term.weight / 1000, *dense_parts(matrix, matrix.rows[term.anchor], module)) for term in recipe.terms]
    parts += [(step / 16, *dense_parts(matrix, matrix.rows[row], module)) for row, step in enumerate(recipe.steps)]
    for weight, a, b in parts:
        delta += weight * (b @ a)
    return delta


@contextmanager
def dense_adapter(
    model: Any, matrix: MetaMatrix, recipe: FusionRecipe, user: UserAdapter | None = None
) -> Iterator[None]:
    """Add a recipe's ΔW, and a user adapter's, B_u A_u, to the weights of a Hugging Face model until the block ends."""
    kept = {}
    with torch.no_grad():
        for module in matrix.layout.modules:
            delta = dense_delta(matrix, recipe, module)
            if user is not None:
                delta += user.weights.b[module.name].double() @ user.weights.a[module.name].double()
            weight = model.get_submodule(module.name).weight
            kept[module.name] = weight.detach().clone()
            weight += delta.to(weight.dtype)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                model.get_submodule(name).weight.copy_(weight)


def two_part_logprobs(
    model: Any, matrix: MetaMatrix, recipes: tuple[FusionRecipe, FusionRecipe], token_ids: list[int], shared: int
) -> torch.Tensor:
    """Return what `token_logprobs` does if one recipe reads the `shared` first tokens, and the other the rest."""
    with torch.no_grad():
        with dense_adapter(model, matrix, recipes[0]):
            read = model(torch.tensor([token_ids[:shared]]), use_cache=True)
        with dense_adapter(model, matrix, recipes[1]):
            rest = model(torch.tensor([token_ids[shared:]]), past_key_values=read.past_key_values)
    return _of_next(torch.cat([read.logits[0], rest.logits[0]]), token_ids)


def token_logprobs(model: Any, token_ids: list[int]) -> torch.Tensor:
    """Return the log-probability of each token but the first given those before it, [T - 1]."""
    with torch.no_grad():
        return _of_next(model(torch.tensor([token_ids])).logits[0], token_ids)


def _of_next(logits: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
    """Return the log-probability of each token but the first by the logits [T, V] of the one before it."""
    return torch.log_softmax(logits[:-1].float(), dim=-1).gather(1, torch.tensor(token_ids)[1:, None])[:, 0]
