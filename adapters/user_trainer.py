"""Few-shot training of a user adapter on a frozen fused one, judged on samples that it did not see.

With few samples every one of them is both: k folds are trained, each judged on the part it left out, and the number
of steps with the lowest mean loss there is what all samples together are then trained for. With many, a part is kept
aside, and the adapter is the one of the best moment. Either way an adapter is only worth keeping when it lowers the
loss of the fused adapter alone. A single sample can only be judged on itself.

The rate is constant after its warm-up, so that stopping early is what a shorter run would have been.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from adapters.attached import TRAINED, Attached, attached
from adapters.errors import TrainingError
from adapters.lora import LoraWeights, ModuleShape
from adapters.trainer import Example, StepReport, TrainPlan, initial_lora, mean_loss, optimise
from adapters.user_adapter import CoreWeights, UserAdapterKind

FOLDS = 2
FEW = 20
"""Up to so many samples are folded; of more, a part is kept aside."""

WARM_UP_STEPS = 2

EXPLODED = 5.0
"""Training ends when a step's loss is so many times the first one's, or so many nats where that was below one."""


@dataclass(frozen=True, slots=True)
class UserPlan:
    """How a user adapter is trained.

    Attributes:
        kind: what is trained.
        rank: R_u of a `lora`; a `core` has the fused adapter's.
        steps: most optimiser steps of one run.
        batch_size: samples a step.
        learning_rate: after the warm-up.
        holdout: share of the samples kept aside where there are many.
        every: steps between two looks at the held-out loss.
        seed: of the split, the order, and where A starts.
    """

    kind: UserAdapterKind
    rank: int
    steps: int
    batch_size: int
    learning_rate: float
    holdout: float
    every: int
    seed: int


@dataclass(frozen=True, slots=True)
class Judgement:
    """What training came to.

    Attributes:
        weights: what was trained; None when nothing lowered the held-out loss.
        before: held-out loss of the fused adapter alone, nats per output token.
        after: the same with the user adapter.
        steps: how long it was trained.
    """

    weights: LoraWeights | CoreWeights | None
    before: float
    after: float
    steps: int


@dataclass(frozen=True, slots=True)
class Progress:
    """Where training is: step `step` of `of` in all its runs, with the loss of the last one."""

    step: int
    of: int
    loss: float


def train_user(
    model: Any,
    fused: LoraWeights,
    samples: Sequence[Example],
    plan: UserPlan,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Judgement:
    """Train and judge a user adapter; the model is left as it was.

    Args:
        model: the base model.
        fused: what the user's recipe stands for, float32.
        samples: at least one.
        plan: how.
        on_step: told after every step; what it raises ends training there.

    Raises:
        TrainingError: when the loss explodes, or is no number any more.
    """
    if not samples:
        raise TrainingError("there are no samples: send some")
    start = None if plan.kind is UserAdapterKind.CORE else _start(fused, plan)
    with attached(model, fused) if start is None else attached(model, start, frozen=fused) as here:
        run = _Run(here, start, plan, on_step)
        if len(samples) == 1:
            return _alone(run, samples)
        return _fold(run, samples) if len(samples) <= FEW else _hold_out(run, samples)


class _Run:
    """Runs of one plan on one attached adapter, each from the same start."""

    def __init__(
        self, here: Attached, start: LoraWeights | None, plan: UserPlan, on_step: Callable[[Progress], None]
    ) -> None:
        self.plan = plan
        self._here, self._start, self._on_step = here, start, on_step
        self._parameters = here.trainable(train_a=True) if start else here.insert_cores()
        self._done = 0
        self.of = plan.steps

    def loss(self, examples: Sequence[Example]) -> float:
        """Loss of the examples under what is attached now."""
        return mean_loss(self._here.model, examples)

    def reset(self) -> None:
        """Back to the start, where the user adapter changes nothing."""
        if self._start is not None:
            self._here.put(TRAINED, self._start)
            return
        for parameter in self._parameters:
            torch.nn.init.eye_(parameter)

    def train(self, samples: Sequence[Example], steps: int, look: Callable[[int], None] = lambda step: None) -> None:
        """One run from the start; `look` is called after every so many steps and after the last."""

        first = math.nan

        def on_step(report: StepReport) -> None:
            nonlocal first
            self._done += 1
            first = report.loss if report.step == 1 else first
            if not report.loss <= EXPLODED * max(1.0, first):  # what is no number is not below anything
                raise TrainingError(
                    f"training exploded: a loss of {report.loss:.4g} at step {report.step}, {first:.4g} at the first: "
                    "lower the learning rate"
                )
            self._on_step(Progress(self._done, self.of, report.loss))
            if report.step % self.plan.every == 0 or report.step == steps:
                look(report.step)

        self.reset()
        size = min(self.plan.batch_size, len(samples))
        train_plan = TrainPlan(steps, size, self.plan.learning_rate, self.plan.seed)
        optimise(self._here.model, self._parameters, samples, train_plan, on_step, rate=_constant)

    def taken(self) -> LoraWeights | CoreWeights:
        """What is attached now."""
        if self._start is not None:
            return self._here.weights()
        cores = self._here.cores()
        return CoreWeights(next(iter(cores.values())).shape[0], cores)


def _fold(run: _Run, samples: Sequence[Example]) -> Judgement:
    """Judge by folds, then train on everything for as long as was best."""
    folds = _folds(len(samples), run.plan.seed)
    run.of = run.plan.steps * (len(folds) + 1)
    before, after = 0.0, dict.fromkeys(_looks(run.plan), 0.0)
    for held in folds:
        kept = [samples[i] for i in range(len(samples)) if i not in held]
        aside = [samples[i] for i in sorted(held)]
        share = len(aside) / len(samples)
        run.reset()
        before += share * run.loss(aside)

        def look(step: int, aside: Sequence[Example] = aside, share: float = share) -> None:
            after[step] += share * run.loss(aside)

        run.train(kept, run.plan.steps, look)
    best = min(after, key=lambda step: (after[step], step))
    if not after[best] < before:
        return Judgement(None, before, after[best], best)
    run.of = run.plan.steps * len(folds) + best
    run.train(samples, best)
    return Judgement(run.taken(), before, after[best], best)


def _alone(run: _Run, samples: Sequence[Example]) -> Judgement:
    """One sample, for half the steps: nothing says when it is enough."""
    run.of = steps = max(1, run.plan.steps // 2)
    run.reset()
    before = run.loss(samples)
    run.train(samples, steps)
    after = run.loss(samples)
    return Judgement(run.taken() if after < before else None, before, after, steps)


def _hold_out(run: _Run, samples: Sequence[Example]) -> Judgement:
    """Keep a part aside and the adapter of the best moment."""
    order = random.Random(run.plan.seed).sample(range(len(samples)), len(samples))
    size = max(1, round(run.plan.holdout * len(samples)))
    aside, kept = [samples[i] for i in order[:size]], [samples[i] for i in order[size:]]
    run.reset()
    before = run.loss(aside)
    best = Judgement(None, before, math.inf, 0)

    def look(step: int) -> None:
        nonlocal best
        after = run.loss(aside)
        if after < best.after:
            best = Judgement(run.taken() if after < before else None, before, after, step)

    run.train(kept, run.plan.steps, look)
    return best


def _start(fused: LoraWeights, plan: UserPlan) -> LoraWeights:
    """Where a `lora` starts: A random, B zero."""
    modules = [ModuleShape(name, a.shape[1], fused.b[name].shape[0]) for name, a in fused.a.items()]
    return initial_lora(modules, plan.rank, plan.seed)


def _looks(plan: UserPlan) -> list[int]:
    """The steps at which the held-out loss is looked at."""
    return [step for step in range(1, plan.steps + 1) if step % plan.every == 0 or step == plan.steps]


def _folds(count: int, seed: int) -> list[set[int]]:
    """Parts of like size that leave out each sample once."""
    order = random.Random(seed).sample(range(count), count)
    folds = min(FOLDS, count)
    return [set(order[fold::folds]) for fold in range(folds)]


def _constant(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP_STEPS)
