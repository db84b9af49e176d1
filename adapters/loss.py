"""The loss of examples under a model: the negative log-likelihood of their output tokens, in nats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adapters.packing import Example, Row, pack


def backward(model: Any, examples: Sequence[Example]) -> float:
    """Add the gradient of the mean loss per output token to whatever moves; the loss, nats."""
    outputs, loss = _output_tokens(examples), 0.0
    for row in pack(model, examples):
        row_loss = _losses(model, row).sum() / outputs
        row_loss.backward()  # type: ignore[no-untyped-call]
        loss += float(row_loss.detach())
    return loss


@torch.no_grad()
def mean_loss(model: Any, examples: Sequence[Example]) -> float:
    """Negative log-likelihood per output token, nats."""
    return sum(float(_losses(model, row).sum()) for row in pack(model, examples)) / _output_tokens(examples)


@torch.no_grad()
def example_losses(model: Any, examples: Sequence[Example]) -> list[float]:
    """The same of each example by itself, in their order."""
    losses: list[float] = []
    for row in pack(model, examples):
        sums = torch.stack([tokens.sum() for tokens in torch.split(_losses(model, row), row.counts)]).tolist()
        losses += [loss / count for loss, count in zip(sums, row.counts, strict=True)]
    return losses


@torch.no_grad()
def likeliest(model: Any, examples: Sequence[Example]) -> list[int]:
    """The likeliest id in the place of each output token, one example after the other."""
    return [token for row in pack(model, examples) for token in _logits(model, row).argmax(-1).tolist()]


def _output_tokens(examples: Sequence[Example]) -> int:
    return sum(len(example.ids) - example.loss_from for example in examples)


def _losses(model: Any, row: Row) -> torch.Tensor:
    """Of each output token of the row, one example after the other."""
    logits = _logits(model, row).float()
    return torch.nn.functional.cross_entropy(logits, torch.tensor(row.wanted).to(logits.device), reduction="none")


def _logits(model: Any, row: Row) -> torch.Tensor:
    """[output tokens of the row, vocabulary]."""
    logits: torch.Tensor = model(**row.inputs(model), use_cache=False).logits[0]
    return logits
