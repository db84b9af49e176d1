"""Loss of examples under a model, as negative log-likelihood of the output tokens in nats, and its gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any

import torch

from adapters.flat import flattened
from adapters.lora import LoraWeights, RowLayout
from adapters.training.attached import attached
from adapters.training.example import Example, output_tokens
from adapters.training.forward.lower_layers import LowerLayers
from adapters.training.forward.packing import Row, pack
from adapters.training.forward.shared_part import SharedPart

_ROWS_AT_A_TIME = 16  # of logits on a CPU, to stay in its cache
_ROWS_ON_A_GPU = 128  # 64 MiB in float32 for 128,000 tokens


def backward(model: Any, examples: Sequence[Example], below: LowerLayers | None = None) -> Iterator[torch.Tensor]:
    """Add the gradient of the mean loss per output token to the trainable parameters; yield each row's part of it.

    The loss is in nats, on the model's device: no row waits for it. Between two rows the model may do other work.
    """
    outputs = output_tokens(examples)
    for row in pack(model, examples):
        yield backward_row(model, row, outputs, below)


def backward_row(model: Any, row: Row, outputs: int, below: LowerLayers | None = None) -> torch.Tensor:
    """Do a row's part of `backward`; `outputs` is the number of output tokens in all rows."""
    loss = _losses(_logits(model, row, below), row).sum() / outputs
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def b_gradient(
    model: Any, layout: RowLayout, lora: LoraWeights, examples: Sequence[Example], shared: SharedPart | None = None
) -> torch.Tensor:
    """Return ∂L/∂B at a LoRA, [R·ΣH_out] float32 in layout order; L is the mean loss per output token."""
    with attached(model, lora, shared=shared) as here:
        here.trainable(train_a=False)
        sum(backward(here.model, examples))
        return flattened(layout, here.take_b_gradients())


def drawn_gradients(
    model: Any,
    layout: RowLayout,
    lora: LoraWeights,
    examples: Sequence[Example],
    seed: int,
    *,
    shared: SharedPart | None = None,
) -> Iterator[torch.Tensor]:
    """Yield ∂L/∂B of each example for an output that the model draws; L is the sum over its tokens.

    Each token is drawn where the example has its own, so the gradients have mean 0 and the covariance of the curvature
    (the Fisher information).
    """
    chance = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    with attached(model, lora, shared=shared) as here:
        here.trainable(train_a=False)
        for example in examples:
            (row,) = pack(here.model, [example])
            logits = _logits(here.model, row)
            drawn = logits.detach().float().softmax(-1).multinomial(1, generator=chance)[:, 0]
            _cross_entropy(logits, drawn).sum().backward()  # type: ignore[no-untyped-call]
            yield flattened(layout, here.take_b_gradients())


def mean_loss(model: Any, examples: Sequence[Example]) -> float:
    """Return the negative log-likelihood per output token, in nats."""
    return sum(map(sum, row_losses(model, examples))) / output_tokens(examples)


def row_losses(model: Any, examples: Sequence[Example], below: LowerLayers | None = None) -> Iterator[list[float]]:
    """Yield the negative log-likelihood of each example in a row, in nats; compute each row on demand."""
    for row in pack(model, examples):
        yield [float(tokens.sum()) for tokens in token_losses(model, row, below)]


def example_losses(model: Any, examples: Sequence[Example]) -> Iterator[torch.Tensor]:
    """Yield the negative log-likelihood of each output token of each example, in nats."""
    for row in pack(model, examples):
        yield from token_losses(model, row)


@torch.no_grad()
def token_losses(model: Any, row: Row, below: LowerLayers | None = None) -> Sequence[torch.Tensor]:
    """Return the negative log-likelihood of each output token, in nats, of each example in a row."""
    return torch.split(_losses(_logits(model, row, below), row).cpu(), row.counts)


@torch.no_grad()
def output_log_chances(model: Any, examples: Sequence[Example]) -> torch.Tensor:
    """Return the log-probability of each token of the vocabulary where each output token is, [T, V] on CPU."""
    return torch.cat([_logits(model, row).float().log_softmax(-1).cpu() for row in pack(model, examples)])


@torch.no_grad()
def score(model: Any, examples: Sequence[Example], among: Sequence[int] = ()) -> list[tuple[float, list[float]]]:
    """Return each example's mean loss per output token, and the probability of each id in `among` as first output."""
    read: list[tuple[float, list[float]]] = []
    for row in pack(model, examples):
        logits = _logits(model, row)
        losses = [float(tokens.mean()) for tokens in torch.split(_losses(logits, row).cpu(), row.counts)]
        firsts = [0, *accumulate(row.counts)][:-1]
        chances = logits[firsts].float().softmax(-1)[:, list(among)]
        read += zip(losses, chances.tolist(), strict=True)
    return read


def _losses(logits: torch.Tensor, row: Row) -> torch.Tensor:
    losses = _cross_entropy(logits, torch.tensor(row.targets).to(logits.device))
    if any(example.mixed for example in row.examples):
        pairs = [pair for each in row.examples for pair in each.mixed or [(1.0, 0.0)] * each.output_tokens]
        kept, added = torch.tensor(pairs).to(losses).log().T
        losses = -torch.logaddexp(kept - losses, added)
    return losses


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    losses: torch.Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


def _logits(model: Any, row: Row, below: LowerLayers | None = None) -> torch.Tensor:
    inputs = row.inputs(model)
    with below.skipped(row) if below else nullcontext(), row.being_read():
        logits: torch.Tensor = model(**inputs, use_cache=False).logits[0]
    return logits


class _CrossEntropy(torch.autograd.Function):
    """[N, V] logits and [N] target ids → [N] losses in float32; processes a few rows at a time."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        moves = ctx.needs_input_grad[0]
        losses = logits.new_empty(len(logits), dtype=torch.float32)
        grad = torch.empty_like(logits) if moves else None
        size = _ROWS_AT_A_TIME if logits.device.type == "cpu" else _ROWS_ON_A_GPU
        for first in range(0, len(logits), size):
            part = slice(first, first + size)
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
