"""Few-shot training of a user adapter on a frozen fused one, judged on samples that it did not see.

Few samples are trained in folds, each judged on what it left out, then all together for the steps that were best there;
of many, a part is kept aside. An adapter is kept only if its loss there is below the fused adapter's own.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from adapters.errors import TrainingError
from adapters.lora import LoraWeights, ModuleShape
from adapters.training.adapt_config import BATCH_SIZE, FEW, FOLDS, LOOK_EVERY, AdaptConfig
from adapters.training.attached import Attached, attached
from adapters.training.example import Example, output_tokens
from adapters.training.forward.lower_layers import LowerLayers, layer_of, upper_half
from adapters.training.loss import row_losses
from adapters.training.trainer import StepReport, TrainPlan, initial_lora, optimise

WARM_UP_STEPS = 2

PATIENCE = 2  # how many looks at the held-out loss without a new low end a run
EXPLODED = 5.0
"""Training fails when a step's loss is this many nats a token above the first one's: it will not come back down."""

UPPER_PACE = 1.75
"""The rate's factor where the upper half of the layers trains alone: with it that learns in eight steps about what all
learn at the planned rate; with 1.9 on headlines, with 1.7 on mails."""


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    step: int  # over all runs, out of `of`
    of: int
    loss: float  # of that step
    phase: str = ""  # what is being done, in a few words
    held_out: float | None = None  # loss on samples that are not trained on, if it was taken after this step


@dataclass(frozen=True, slots=True)
class Judgement:
    """The outcome of training; losses are held-out ones, in nats per output token."""

    weights: LoraWeights | None  # None when nothing lowered the loss
    before: float  # the fused adapter alone
    after: float  # with the user's
    steps: int


_Judging = Generator[TrainingProgress, None, Judgement]
_Losses = dict[int, float]  # held-out losses by step


@dataclass
class TrainingRun:
    """Training that goes on only while it is iterated over: leave the loop to end it. The model is then as it was.

    Yields the progress after every step, and after each row of samples read between steps. `judgement` is None until
    training has ended.
    """

    progress: _Judging
    judgement: Judgement | None = None

    def __iter__(self) -> Iterator[TrainingProgress]:
        self.judgement = yield from self.progress

    def finish(self) -> Judgement:
        for _ in self:
            pass
        assert self.judgement is not None
        return self.judgement


def train_user(model: Any, fused: LoraWeights, samples: Sequence[Example], config: AdaptConfig) -> TrainingRun:
    """Train a user adapter on what the user's recipe stands for, float32; TrainingError if there are no samples.

    While training, TrainingError when the loss explodes or is no number.
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
    order = _shuffled(len(samples), run.config.seed)
    before, after, steps = 0.0, defaultdict[int, float](float), run.config.steps
    for fold in range(FOLDS):
        held = set(order[fold::FOLDS])
        aside = [samples[i] for i in sorted(held)]
        kept = [samples[i] for i in range(len(samples)) if i not in held]
        share = len(aside) / len(samples)
        before += share * (yield from run.begin(f"fold {fold + 1} of {FOLDS}", aside))
        losses, _ = yield from run.watched(kept, aside, steps, runs=FOLDS + 1, patient=fold == 0)
        steps = max(losses)
        for step, loss in losses.items():
            after[step] += share * loss
    best = min(after, key=lambda step: (after[step], step))
    if not after[best] < before:
        return Judgement(None, before, after[best], best)
    run.enter("all samples")
    for report in run.train(samples, best):
        yield run.count(report, of=steps * FOLDS + best)
    return Judgement(run.weights(), before, after[best], best)


def _alone(run: UserRun, samples: Sequence[Example]) -> _Judging:
    """One sample, judged on itself, for half the steps: nothing says when to stop."""
    steps = max(1, run.config.steps // 2)
    before = yield from run.begin("the one sample", samples)
    for report in run.train(samples, steps):
        yield run.count(report, of=steps)
    after = yield from run.loss(samples)
    return Judgement(run.weights() if after < before else None, before, after, steps)


def _hold_out(run: UserRun, samples: Sequence[Example]) -> _Judging:
    """Keep a part aside, and keep the adapter as it was at its best there."""
    order = _shuffled(len(samples), run.config.seed)
    size = max(1, round(run.config.holdout * len(samples)))
    aside, kept = [samples[i] for i in order[:size]], [samples[i] for i in order[size:]]
    before = yield from run.begin("all samples but those held out", aside)
    losses, weights = yield from run.watched(kept, aside, run.config.steps, keep_below=before)
    best = min(losses, key=losses.__getitem__)
    return Judgement(weights, before, losses[best], best)


def _shuffled(count: int, seed: int) -> list[int]:
    return random.Random(seed).sample(range(count), count)


@dataclass(slots=True)
class UserRun:
    """Runs of one configuration on one attached LoRA, each from the same start; all but `parameters` is frozen.

    The rate is constant after its warm-up, so that a run stopped early equals a shorter run.
    """

    config: AdaptConfig
    lora: Attached
    start: LoraWeights
    modules: Sequence[ModuleShape]  # of the fused adapter
    below: LowerLayers | None  # the layers below those that move
    parameters: list[torch.nn.Parameter]
    now: TrainingProgress = TrainingProgress(0, 0, 0.0)

    def enter(self, phase: str) -> None:
        self.now = replace(self.now, phase=phase)

    def begin(self, phase: str, held_out: Sequence[Example]) -> Generator[TrainingProgress, None, float]:
        """Go back to the start, where the user's LoRA changes nothing, and return the held-out loss there."""
        self.enter(phase)
        self.lora.put(self.start)
        loss = yield from self.loss(held_out)
        yield replace(self.now, held_out=loss)
        return loss

    def loss(self, examples: Sequence[Example]) -> Generator[TrainingProgress, None, float]:
        """The examples' mean loss under the adapter as it is now; yields the progress after each row of them."""
        loss = 0.0
        for row_loss in row_losses(self.lora.model, examples, self.below):
            loss += row_loss
            yield self.now
        return loss / output_tokens(examples)

    def watched(
        self,
        samples: Sequence[Example],
        aside: Sequence[Example],
        steps: int,
        *,
        runs: int = 1,
        patient: bool = True,
        keep_below: float = -math.inf,
    ) -> Generator[TrainingProgress, None, tuple[_Losses, LoraWeights | None]]:
        """One of so many runs, looking at what is held out; `patient`, until its loss has stopped falling.

        Returns these losses and the weights at the lowest, if it is below `keep_below`.
        """
        losses: _Losses = {}
        weights = None
        for report in self.train(samples, steps):
            loss = None
            if report.step % LOOK_EVERY == 0 or report.step == steps:
                loss = losses[report.step] = yield from self.loss(aside)
                best = min(losses, key=losses.__getitem__)
                if best == report.step and loss < keep_below:
                    weights = self.weights()
                if patient and report.step - best >= PATIENCE * LOOK_EVERY:
                    steps = report.step
            yield self.count(report, of=steps * runs, held_out=loss)
            if report.step == steps:
                break
        return losses, weights

    def train(self, samples: Sequence[Example], steps: int) -> Iterator[StepReport]:
        """One run from the start, a step for each report; TrainingError when the loss explodes or is no number."""
        self.lora.put(self.start)
        rate = self.config.learning_rate * (UPPER_PACE if self.below else 1.0)
        plan = TrainPlan(steps, min(BATCH_SIZE, len(samples)), rate, self.config.seed)
        first = math.nan
        for report in optimise(self.lora.model, self.parameters, samples, plan, rate=_constant, below=self.below):
            first = report.loss if report.step == 1 else first
            if not report.loss <= first + EXPLODED:  # NaN is not below anything
                raise TrainingError(
                    f"training exploded: a loss of {report.loss:.4g} at step {report.step}, {first:.4g} at the first "
                    "step: lower the learning rate"
                )
            yield report

    def count(self, report: StepReport, of: int, held_out: float | None = None) -> TrainingProgress:
        self.now = replace(self.now, step=self.now.step + 1, of=of, loss=report.loss)
        return replace(self.now, held_out=held_out)

    def weights(self) -> LoraWeights:
        """The user's LoRA as it is now, zero where no module moves, float32 on CPU."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters):  # no loss was taken since
            raise TrainingError(
                "training exploded: its last step left weights that are not finite: lower the learning rate"
            )
        made, rank = self.lora.weights(), self.start.rank
        a = {m.name: made.a.get(m.name, torch.zeros(rank, m.h_in)) for m in self.modules}
        b = {m.name: made.b.get(m.name, torch.zeros(m.h_out, rank)) for m in self.modules}
        return LoraWeights(rank, a, b)


@contextmanager
def user_run(model: Any, fused: LoraWeights, config: AdaptConfig) -> Iterator[UserRun]:
    """Attach a new user's LoRA on top of a fused adapter; the model is left as it was.

    It adapts the upper half of the layers where that can run alone, which takes half the time.
    """
    modules = [ModuleShape(name, a.shape[1], fused.b[name].shape[0]) for name, a in fused.a.items()]
    half = upper_half(model, fused.a)
    moving = modules if half is None else [m for m in modules if layer_of(m.name) >= half[1]]
    start = initial_lora(moving, config.rank, config.seed)
    with attached(model, start, frozen=fused) as here:
        below = None if half is None else LowerLayers(model, model.get_submodule(half[0]), half[1])
        yield UserRun(config, here, start, modules, below, here.trainable(train_a=True))


def _constant(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP_STEPS)
