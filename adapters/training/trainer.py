"""Training one LoRA on a frozen base model: AdamW without weight decay, gradients clipped.

Everything random comes from the plan's seed and nothing from global state, so the same call gives the same weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapters.errors import FusionError, excerpt
from adapters.lora import LoraWeights, ModuleShape
from adapters.training.attached import attached
from adapters.training.example import Example
from adapters.training.forward.lower_layers import LowerLayers
from adapters.training.loss import backward

WARM_UP = 0.1
CLIP_NORM = 1.0


@dataclass(frozen=True, slots=True)
class TrainPlan:
    steps: int
    batch_size: int
    learning_rate: float  # at its peak
    seed: int  # of the examples' order


@dataclass(frozen=True, slots=True)
class StepReport:
    step: int  # from 1
    loss: float  # mean per output token, before the step
    tokens: int  # ids read


def linear_modules(model: Any, targets: Sequence[str] | None = None) -> tuple[ModuleShape, ...]:
    """In model order, those whose last parts are `targets`, else all but the output head; FusionError for no match."""
    head = model.get_output_embeddings()
    found = [
        ModuleShape(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    kinds = sorted({module.name.rsplit(".", 1)[-1] for module in found})
    unknown = sorted(set(targets or kinds) - set(kinds))
    if unknown or not found:
        raise FusionError(f"the base model has no linear modules {excerpt(unknown)}; it has {', '.join(kinds)}")
    return tuple(module for module in found if not targets or module.name.rsplit(".", 1)[-1] in targets)


def initial_lora(modules: Sequence[ModuleShape], rank: int, seed: int) -> LoraWeights:
    """The usual start, float32: A uniform in ±1/√H_in, B zero, so ΔW is zero."""
    generator = torch.Generator().manual_seed(seed)
    return LoraWeights(
        rank=rank,
        a={m.name: (torch.rand(rank, m.h_in, generator=generator) * 2 - 1) * m.h_in**-0.5 for m in modules},
        b={m.name: torch.zeros(m.h_out, rank) for m in modules},
    )


def rate_factor(step: int, steps: int) -> float:
    """The share of the peak rate at a step (from 0): linear warm-up over a tenth, then a half cosine down to 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train_lora(
    model: Any,
    examples: Sequence[Example],
    plan: TrainPlan,
    *,
    start: LoraWeights,
    train_a: bool = True,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> LoraWeights:
    """Train a LoRA from `start`, which says what modules it adapts, to float32 on CPU; the model is left as it was."""
    if not examples:
        raise FusionError("there is nothing to train on: no example has an output")
    with attached(model, start) as lora:
        for report in optimise(lora.model, lora.trainable(train_a=train_a), examples, plan):
            on_step(report)
        return lora.weights()


def optimise(
    model: Any,
    parameters: Sequence[torch.nn.Parameter],
    examples: Sequence[Example],
    plan: TrainPlan,
    *,
    rate: Callable[[int, int], float] = rate_factor,
    below: LowerLayers | None = None,
) -> Iterator[StepReport]:
    """Train parameters in place, a step for each report that is asked for; `rate` of (step from 0, steps)."""
    optimiser = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, plan.steps))
    batches = _batches(len(examples), plan.batch_size, plan.seed)
    for step in range(1, plan.steps + 1):
        batch = [examples[i] for i in next(batches)]
        loss = backward(model, batch, below)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimiser.step()
        torch.autograd.graph.increment_version(parameters)  # what PyTorch forgets where `fused`, and copies are kept by
        schedule.step()
        optimiser.zero_grad()
        yield StepReport(step, loss, sum(len(example.ids) for example in batch))


def _batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    order = random.Random(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += order.sample(range(count), count)
        yield queue[:size]
        del queue[:size]
