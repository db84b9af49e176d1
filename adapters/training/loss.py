"""Loss of examples under a model, as negative log-likelihood of the output tokens in nats, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch

from adapters.flat import flat_b
from adapters.lora import LoraWeights, RowLayout
from adapters.training.attached import attached
from adapters.training.example import Example, output_tokens
from adapters.training.forward.attention import in_blocks
from adapters.training.forward.lower_layers import LowerLayers
from adapters.training.forward.packing import Row, pack

_ROWS_AT_A_TIME = 16


def backward(model: Any, examples: Sequence[Example], below: LowerLayers | None = None) -> float:
    """Add the gradient of the mean loss per output token to the trainable parameters, and return the loss in nats."""
    outputs, loss = output_tokens(examples), 0.0
    for row in pack(model, examples):
        row_loss = _losses(model, row, below).sum() / outputs
        row_loss.backward()  # type: ignore[no-untyped-call]
        loss += float(row_loss.detach())
    return loss


def b_gradient(model: Any, layout: RowLayout, lora: LoraWeights, examples: Sequence[Example]) -> torch.Tensor:
    """Return ∂L/∂B at a LoRA, [R·ΣH_out] float32 on CPU in layout order; L is the mean loss per output token."""
    with attached(model, lora) as here:
        here.trainable(train_a=False)
        backward(here.model, examples)
        grads = here.b_gradients()
    return flat_b(layout, LoraWeights(lora.rank, lora.a, grads))


def mean_loss(model: Any, examples: Sequence[Example]) -> float:
    """Return the negative log-likelihood per output token, in nats."""
    return sum(row_losses(model, examples)) / output_tokens(examples)


@torch.no_grad()
def row_losses(model: Any, examples: Sequence[Example], below: LowerLayers | None = None) -> Iterator[float]:
    """Yield the negative log-likelihood of each row of examples, in nats; compute each row on demand."""
    for row in pack(model, examples):
        yield float(_losses(model, row, below).sum())


@torch.no_grad()
def score(model: Any, examples: Sequence[Example], among: Sequence[int] = ()) -> list[tuple[float, list[float]]]:
    """Return each example's mean loss per output token, and the probability of each id in `among` as first output."""
    found: list[tuple[float, list[float]]] = []
    for row in pack(model, examples):
        logits = _logits(model, row)
        losses = [float(tokens.mean()) for tokens in torch.split(_losses_of(logits, row).cpu(), row.counts)]
        firsts = [0, *accumulate(row.counts)][:-1]
        chances = logits[firsts].float().softmax(-1)[:, list(among)]
        found += zip(losses, chances.tolist(), strict=True)
    return found


def _losses(model: Any, row: Row, below: LowerLayers | None) -> torch.Tensor:
    return _losses_of(_logits(model, row, below), row)


def _losses_of(logits: torch.Tensor, row: Row) -> torch.Tensor:
    targets = torch.tensor(row.targets).to(logits.device)
    losses: torch.Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


def _logits(model: Any, row: Row, below: LowerLayers | None = None) -> torch.Tensor:
    with below.skipped(row) if below else nullcontext(), in_blocks(row.blocks()):
        logits: torch.Tensor = model(**row.inputs(model), use_cache=False).logits[0]
    return logits


class _CrossEntropy(torch.autograd.Function):
    """[N, V] logits and [N] target ids → [N] losses in float32; processes a few rows at a time to stay in the cache."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        moves = ctx.needs_input_grad[0]
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        grad = torch.empty_like(logits) if moves else None
        for first in range(0, len(logits), _ROWS_AT_A_TIME):
            part = slice(first, first + _ROWS_AT_A_TIME)
            likely, ids = logits[part].float().log_softmax(-1), targets[part, None]
            losses[part] = -likely.gather(1, ids)[:, 0]
            if grad is not None:
                grad[part] = likely.exp_().scatter_add_(1, ids, likely.new_full(ids.shape, -1.0))
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (grad,) = ctx.saved_tensors
        return grad * grads[0][:, None].to(grad.dtype), None
