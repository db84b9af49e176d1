"""The gradient of a loss with respect to a LoRA's B: to first order, what any other B would do to these examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from adapters.flat import flat_b
from adapters.layout import RowLayout
from adapters.lora import LoraWeights
from adapters.training.attached import attached
from adapters.training.example import Example
from adapters.training.loss import backward


def b_gradient(model: Any, layout: RowLayout, lora: LoraWeights, examples: Sequence[Example]) -> torch.Tensor:
    """∂L/∂B at a LoRA, where L is the examples' mean loss per output token.

    It takes a forward and a backward pass. For a B that differs by Δ, the loss differs by ⟨∂L/∂B, Δ⟩ to first order.

    Args:
        model: the base model; left as it was.
        layout: gives the order of the flat numbers.
        lora: where the gradient is taken.
        examples: at least one.

    Returns:
        [R·ΣH_out] float32 on CPU, in layout order.
    """
    with attached(model, lora) as here:
        here.trainable(train_a=False)
        backward(here.model, examples)
        grads = here.b_gradients()
    return flat_b(layout, LoraWeights(lora.rank, lora.a, grads))
