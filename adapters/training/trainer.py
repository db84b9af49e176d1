"""Train one LoRA on a frozen base model, with AdamW without weight decay and with clipped gradients.

All randomness comes from the plan's seed, never from global state, so the same call gives the same weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapters.errors import FusionError, excerpt
from adapters.lora import LoraWeights, ModuleShape
from adapters.training.attached import attached
from adapters.training.example import Example
from adapters.training.forward.shared_part import SharedPart
from adapters.training.loss import backward

WARM_UP = 0.1
CLIP_NORM = 1.0
Gradient = Callable[[Any, Sequence[Example]], Iterable[torch.Tensor]]  # as `backward`


@dataclass(frozen=True, slots=True)
class TrainPlan:
    steps: int
    batch_size: int
    learning_rate: float  # peak rate
    seed: int  # for the order of the examples


@dataclass(frozen=True, slots=True)
class StepReport:
    step: int  # starts at 1
    loss: float  # mean per output token, before the step
    tokens: int  # number of tokens read


def linear_modules(model: Any, targets: Sequence[str] | None = None) -> tuple[ModuleShape, ...]:
    """Return the language model's modules named in `targets`, or all but its output head; FusionError if none match."""
    head, language_model = model.get_output_embeddings(), set(model.get_decoder().modules())
    modules = [
        ModuleShape(name, module.in_features, module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module in language_model and module is not head
    ]
    kinds = sorted({module.name.rsplit(".", 1)[-1] for module in modules})
    unknown = sorted(set(targets or kinds) - set(kinds))
    if unknown or not modules:
        raise FusionError(f"the base model has no linear modules {excerpt(unknown)}; it has {', '.join(kinds)}")
    return tuple(module for module in modules if not targets or module.name.rsplit(".", 1)[-1] in targets)


def initial_lora(modules: Sequence[ModuleShape], rank: int, seed: int) -> LoraWeights:
    """Return the usual float32 start: A uniform in ±1/√H_in and B zero, so ΔW is zero."""
    generator = torch.Generator().manual_seed(seed)
    a = {m.name: (torch.rand(rank, m.h_in, generator=generator) * 2 - 1) * m.h_in**-0.5 for m in modules}
    return LoraWeights(rank, a, {m.name: torch.zeros(m.h_out, rank) for m in modules})


def rate_factor(step: int, steps: int) -> float:
    """Return the share of the peak rate at `step` (from 0): linear warm-up, then a half cosine down to 0."""
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
    gradient: Gradient = backward,
    shared: SharedPart | None = None,
) -> LoraWeights:
    """Train a LoRA that starts at `start` and adapts the same modules, and return it as float32 on CPU."""
    if not examples:
        raise FusionError("there is nothing to train on: no example has an output")
    with attached(model, start, shared=shared) as lora:
        for report in optimise(lora.model, lora.trainable(train_a=train_a), examples, plan, gradient=gradient):
            if report is not None:
                on_step(report)
        return lora.weights()


def optimise(
    model: Any,
    parameters: Sequence[torch.nn.Parameter],
    examples: Sequence[Example],
    plan: TrainPlan,
    *,
    rate: Callable[[int, int], float] = rate_factor,
    gradient: Gradient = backward,
) -> Iterator[StepReport | None]:
    """Train parameters in place and report each step; yield None after each row that a step reads.

    `rate` maps (step from 0, steps) to a factor.
    """
    optimiser = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate(step, plan.steps))
    batches = _batches(len(examples), plan.batch_size, plan.seed)
    for step in range(1, plan.steps + 1):
        batch = [examples[i] for i in next(batches)]
        losses = list[torch.Tensor]()
        for part in gradient(model, batch):
            losses.append(part)
            yield None
        torch.nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        optimiser.step()
        torch.autograd.graph.increment_version(parameters)  # fused AdamW omits this, and `AdaptedLinear` needs it
        schedule.step()
        optimiser.zero_grad()
        yield StepReport(step, float(sum(losses)), sum(len(example.ids) for example in batch))


def _batches(count: int, size: int, seed: int) -> Iterator[list[int]]:
    order = random.Random(seed)
    queue: list[int] = []
    while True:
        while len(queue) < size:
            queue += order.sample(range(count), count)
        yield queue[:size]
        del queue[:size]
