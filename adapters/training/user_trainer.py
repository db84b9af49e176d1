"""Few-shot training of a user adapter on a frozen fused one, judged on samples that it did not see.

With few samples each serves for both: k folds are trained, each judged on the part it left out, and then all samples
together are trained for the number of steps with the lowest mean loss there. With many, a part is kept aside, and the
adapter is kept as it was at its best. Either way it is worth keeping only if its loss is below the fused adapter's own.
A single sample can only be judged on itself.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from adapters.errors import TrainingError
from adapters.lora import LoraWeights
from adapters.training.adapt_config import FEW, FOLDS, AdaptConfig
from adapters.training.example import Example
from adapters.training.user_run import Patience, TrainingProgress, UserRun, looks, user_run


@dataclass(frozen=True, slots=True)
class Judgement:
    """The outcome of training: the weights, None when nothing lowered the held-out loss, after so many steps.

    `before` is the held-out loss of the fused adapter alone, `after` that with the user's, in nats per output token.
    """

    weights: LoraWeights | None
    before: float
    after: float
    steps: int


_Judging = Generator[TrainingProgress, None, Judgement]


class TrainingRun:
    """Training of a user adapter, which goes on only while it is iterated over: leave the loop to end it.

    Iterating yields the progress after every step and after each row of samples read between steps. Once the loop has
    ended or been left, the model is as it was. `judgement` is None until training has ended.
    """

    def __init__(self, progress: _Judging) -> None:
        self.judgement: Judgement | None = None
        self._progress = progress

    def __iter__(self) -> Iterator[TrainingProgress]:
        self.judgement = yield from self._progress

    def finish(self) -> Judgement:
        """Train to the end."""
        for _ in self:
            pass
        assert self.judgement is not None
        return self.judgement


def train_user(model: Any, fused: LoraWeights, samples: Sequence[Example], config: AdaptConfig) -> TrainingRun:
    """Train and judge a user adapter on what the user's recipe stands for, float32, step by step.

    TrainingError when there are no samples; while training, when the loss explodes or is no number.
    """
    if not samples:
        raise TrainingError("there are no samples: send some")
    return TrainingRun(_training(model, fused, samples, config))


def _training(model: Any, fused: LoraWeights, samples: Sequence[Example], config: AdaptConfig) -> _Judging:
    judge = _alone if len(samples) == 1 else _fold if len(samples) <= FEW else _hold_out
    with user_run(model, fused, config) as run:
        return (yield from judge(run, samples))


def _fold(run: UserRun, samples: Sequence[Example]) -> _Judging:
    """Judge by folds, each as long as the first, then train on everything for the number of steps that was best."""
    folds = _folds(len(samples), run.config.seed)
    patience = Patience()
    before, after, steps = 0.0, defaultdict[int, float](float), run.config.steps
    for place, held in enumerate(folds):
        kept = [samples[i] for i in range(len(samples)) if i not in held]
        aside = [samples[i] for i in sorted(held)]
        share = len(aside) / len(samples)
        start = yield from run.begin(f"fold {place + 1} of {len(folds)}", aside)
        before += share * start
        for report in run.train(kept, steps):
            loss = None
            if looks(report.step, steps):
                loss = yield from run.loss(aside)
                after[report.step] += share * loss
                if place == 0 and not patience.holds(report.step, loss):
                    steps = report.step
            yield run.count(report, of=steps * (len(folds) + 1), held_out=loss)
            if report.step == steps:
                break
    best = min(after, key=lambda step: (after[step], step))
    if not after[best] < before:
        return Judgement(None, before, after[best], best)
    run.enter("all samples")
    for report in run.train(samples, best):
        yield run.count(report, of=steps * len(folds) + best)
    return Judgement(run.weights(), before, after[best], best)


def _alone(run: UserRun, samples: Sequence[Example]) -> _Judging:
    """One sample, for half the steps: nothing says when to stop."""
    steps = max(1, run.config.steps // 2)
    before = yield from run.begin("the one sample", samples)
    for report in run.train(samples, steps):
        yield run.count(report, of=steps)
    after = yield from run.loss(samples)
    return Judgement(run.weights() if after < before else None, before, after, steps)


def _hold_out(run: UserRun, samples: Sequence[Example]) -> _Judging:
    """Keep a part aside, and keep the adapter as it was at its best there."""
    order = random.Random(run.config.seed).sample(range(len(samples)), len(samples))
    size = max(1, round(run.config.holdout * len(samples)))
    aside, kept = [samples[i] for i in order[:size]], [samples[i] for i in order[size:]]
    patience, steps = Patience(), run.config.steps
    before = yield from run.begin("all samples but those held out", aside)
    best = Judgement(None, before, math.inf, 0)
    for report in run.train(kept, steps):
        after = None
        if looks(report.step, steps):
            after = yield from run.loss(aside)
            if after < best.after:
                best = Judgement(run.weights() if after < before else None, before, after, report.step)
            if not patience.holds(report.step, after):
                steps = report.step
        yield run.count(report, of=steps, held_out=after)
        if report.step == steps:
            break
    return best


def _folds(count: int, seed: int) -> list[set[int]]:
    """Parts of similar size; each sample is in exactly one."""
    order = random.Random(seed).sample(range(count), count)
    folds = min(FOLDS, count)
    return [set(order[fold::folds]) for fold in range(folds)]
