"""Few-shot training of a user adapter on a frozen fused one, judged on samples that it did not see.

With few samples every one of them is both: k folds are trained, each judged on the part it left out, and the number
of steps with the lowest mean loss there is what all samples together are then trained for. With many, a part is kept
aside, and the adapter is the one of the best moment. Either way an adapter is only worth keeping when it lowers the
loss of the fused adapter alone. A single sample can only be judged on itself.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import TrainingError
from adapters.lora import LoraWeights, ModuleShape
from adapters.training.attached import attached
from adapters.training.example import Example
from adapters.training.trainer import initial_lora
from adapters.training.user_run import Patience, Progress, UserPlan, UserRun
from adapters.user_adapter import CoreWeights, UserAdapterKind

FOLDS = 2
FEW = 20
"""Up to so many samples are folded; of more, a part is kept aside."""


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


def train_user(
    model: Any,
    fused: LoraWeights,
    samples: Sequence[Example],
    plan: UserPlan,
    on_step: Callable[[Progress], None] = lambda progress: None,
    *,
    alive: Callable[[], None] = lambda: None,
) -> Judgement:
    """Train and judge a user adapter; the model is left as it was.

    Args:
        model: the base model.
        fused: what the user's recipe stands for, float32.
        samples: at least one.
        plan: how.
        on_step: told after every step; what it raises ends training there.
        alive: called between steps, after each row of samples that is read; what it raises ends training too.

    Raises:
        TrainingError: when the loss explodes, or is no number any more.
    """
    if not samples:
        raise TrainingError("there are no samples: send some")
    start = None if plan.kind is UserAdapterKind.CORE else _start(fused, plan)
    with attached(model, fused) if start is None else attached(model, start, frozen=fused) as here:
        run = UserRun(here, start, plan, on_step, alive)
        if len(samples) == 1:
            return _alone(run, samples)
        return _fold(run, samples) if len(samples) <= FEW else _hold_out(run, samples)


def _fold(run: UserRun, samples: Sequence[Example]) -> Judgement:
    """Judge by folds, then train on everything for as long as was best.

    The first fold ends when it has been past its best for a while; the others are as long.
    """
    folds = _folds(len(samples), run.plan.seed)
    run.of = run.plan.steps * (len(folds) + 1)
    before, after, steps = 0.0, defaultdict[int, float](float), run.plan.steps
    for place, held in enumerate(folds):
        kept = [samples[i] for i in range(len(samples)) if i not in held]
        aside = [samples[i] for i in sorted(held)]
        share = len(aside) / len(samples)
        run.reset()
        before += share * run.loss(aside)
        patience = Patience(run.plan.every) if place == 0 else None

        def look(
            step: int,
            aside: Sequence[Example] = aside,
            share: float = share,
            patience: Patience | None = patience,
        ) -> bool:
            loss = run.loss(aside)
            after[step] += share * loss
            return patience is None or patience.holds(step, loss)

        taken = run.train(kept, steps, look)
        run.of -= (steps - taken) * (len(folds) - place)  # the folds that follow and the last run are no longer
        steps = taken
    best = min(after, key=lambda step: (after[step], step))
    run.of -= steps - best
    if not after[best] < before:
        return Judgement(None, before, after[best], best)
    run.train(samples, best)
    return Judgement(run.taken(), before, after[best], best)


def _alone(run: UserRun, samples: Sequence[Example]) -> Judgement:
    """One sample, for half the steps: nothing says when it is enough."""
    run.of = steps = max(1, run.plan.steps // 2)
    run.reset()
    before = run.loss(samples)
    run.train(samples, steps)
    after = run.loss(samples)
    return Judgement(run.taken() if after < before else None, before, after, steps)


def _hold_out(run: UserRun, samples: Sequence[Example]) -> Judgement:
    """Keep a part aside and the adapter of the best moment."""
    order = random.Random(run.plan.seed).sample(range(len(samples)), len(samples))
    size = max(1, round(run.plan.holdout * len(samples)))
    aside, kept = [samples[i] for i in order[:size]], [samples[i] for i in order[size:]]
    run.reset()
    before = run.loss(aside)
    best = Judgement(None, before, math.inf, 0)

    patience = Patience(run.plan.every)

    def look(step: int) -> bool:
        nonlocal best
        after = run.loss(aside)
        if after < best.after:
            best = Judgement(run.taken() if after < before else None, before, after, step)
        return patience.holds(step, after)

    run.train(kept, run.plan.steps, look)
    return best


def _start(fused: LoraWeights, plan: UserPlan) -> LoraWeights:
    """Where a `lora` starts: A random, B zero."""
    modules = [ModuleShape(name, a.shape[1], fused.b[name].shape[0]) for name, a in fused.a.items()]
    return initial_lora(modules, plan.rank, plan.seed)


def _folds(count: int, seed: int) -> list[set[int]]:
    """Parts of like size that leave out each sample once."""
    order = random.Random(seed).sample(range(count), count)
    folds = min(FOLDS, count)
    return [set(order[fold::folds]) for fold in range(folds)]
