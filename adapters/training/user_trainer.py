"""Few-shot training of a user adapter on a frozen fused adapter, kept only if it lowers the held-out loss.

Few samples are cross-validated to find the number of steps, then all train; of many samples, a part is held out.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from adapters.errors import TrainingError
from adapters.lora import LoraWeights, ModuleShape
from adapters.training.adapt_config import BATCH_SIZE, EVAL_INTERVAL, FOLDS, MAX_FOLDED, AdaptConfig
from adapters.training.attached import Attached, attached
from adapters.training.example import Example, output_tokens
from adapters.training.forward.lower_layers import LowerLayers, layer_of, upper_half
from adapters.training.loss import backward, row_losses
from adapters.training.trainer import StepReport, TrainPlan, initial_lora, optimise

WARM_UP_STEPS = 2
PATIENCE = 2  # number of evaluations without a new lowest held-out loss after which a run ends
MAX_LOSS_RISE = 5.0  # above the first step, in nats per token: such a run does not recover, so training fails
# Learning-rate factor with which eight steps of the upper half of the layers learn about as much as all layers do (the
# exact factor was 1.9 on headlines and 1.7 on mails).
UPPER_HALF_FACTOR = 1.75


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    step: int  # over all runs
    of: int  # total number of steps
    loss: float  # training loss of the step
    phase: str = ""  # short description of the current run
    held_out: float | None = None  # held-out loss, if evaluated after this step


@dataclass(frozen=True, slots=True)
class Judgement:
    """The outcome of training; the losses are held-out losses in nats per output token."""

    weights: LoraWeights | None  # None if training did not lower the loss
    before: float  # loss of the fused adapter alone
    after: float  # loss with the user adapter
    steps: int
    judges: Sequence[int] = ()  # places of the samples that these losses are about
    served: float | None = None  # loss of the adapter that was served meanwhile, if it was asked for


@dataclass(frozen=True, slots=True)
class Served:
    """The user adapter that is served, and the fused adapter that it was trained on."""

    fused: LoraWeights
    adapter: LoraWeights


_Judging = Generator[TrainingProgress, None, Judgement]
_Losses = dict[int, float]  # held-out losses by step


@dataclass
class TrainingRun:
    """Training that advances as it is iterated, and ends and restores the model when the loop is left.

    Yields progress after each step and each held-out row. `judgement` is None until training has finished.
    """

    progress: _Judging
    judgement: Judgement | None = None

    def __iter__(self) -> Generator[TrainingProgress, None, None]:
        self.judgement = yield from self.progress

    def finish(self) -> Judgement:
        for _ in self:
            pass
        assert self.judgement is not None
        return self.judgement


def train_user(
    model: Any,
    fused: LoraWeights,
    samples: Sequence[Example],
    config: AdaptConfig,
    *,
    newest: int | None = None,
    served: Served | None = None,
) -> TrainingRun:
    """Train a user adapter on the fused adapter (float32); TrainingError without samples, or if the loss diverges.

    Only the last `newest` samples are held out, by default all. The adapter that is served must lose more on them.
    """
    if not samples:
        raise TrainingError("there are no samples: send some")
    count = len(samples)
    judges = range(count - (newest or count), count)
    return TrainingRun(_training(model, fused, samples, config, judges=judges, served=served))


def _training(
    model: Any,
    fused: LoraWeights,
    samples: Sequence[Example],
    config: AdaptConfig,
    *,
    judges: range,
    served: Served | None,
) -> _Judging:
    is_folded = 1 < len(judges) <= len(samples) <= MAX_FOLDED
    train = _train_single if len(samples) == 1 else _train_folds if is_folded else _train_with_holdout
    with user_run(model, fused, config) as run:
        judgement = yield from train(run, samples, judges)
        now = run.now
    if served is None:
        return judgement
    with attached(model, served.adapter, frozen=served.fused) as here:
        held = [samples[place] for place in judgement.judges]
        loss = yield from _loss(here.model, held, None, now)
    return replace(judgement, served=loss, weights=judgement.weights if judgement.after < loss else None)


def _loss(
    model: Any, examples: Sequence[Example], below: LowerLayers | None, now: TrainingProgress
) -> Generator[TrainingProgress, None, float]:
    """Return the examples' mean loss; yield the progress after each row."""
    loss = 0.0
    for row_loss in row_losses(model, examples, below):
        loss += row_loss
        yield now
    return loss / output_tokens(examples)


def _train_folds(run: UserRun, samples: Sequence[Example], judges: range) -> _Judging:
    """Cross-validate, with all folds as long as the first, then train on all samples for the best number of steps."""
    order = random.Random(run.config.seed).sample(judges, len(judges))
    before, after, steps = 0.0, defaultdict[int, float](float), run.config.steps
    tokens = output_tokens([samples[place] for place in judges])
    for fold in range(FOLDS):
        held = set(order[fold::FOLDS])
        aside = [samples[i] for i in sorted(held)]
        kept = [samples[i] for i in range(len(samples)) if i not in held]
        share = output_tokens(aside) / tokens
        before += share * (yield from run.begin(f"fold {fold + 1} of {FOLDS}", aside))
        losses, _ = yield from run.evaluated(kept, aside, steps, runs=FOLDS + 1, stop_early=fold == 0)
        steps = max(losses)
        for step, loss in losses.items():
            after[step] += share * loss
    best = min(after, key=lambda step: (after[step], step))
    if not after[best] < before:
        return Judgement(None, before, after[best], best, judges)
    run.enter("all samples")
    for report in run.train(samples, best):
        yield run.count(report, of=steps * FOLDS + best)
    return Judgement(run.weights(), before, after[best], best, judges)


def _train_single(run: UserRun, samples: Sequence[Example], judges: range) -> _Judging:
    """Train on one sample and evaluate on the same, for half the steps, as no held-out loss can end the run."""
    steps = max(1, run.config.steps // 2)
    before = yield from run.begin("the one sample", samples)
    for report in run.train(samples, steps):
        yield run.count(report, of=steps)
    after = yield from run.loss(samples)
    return Judgement(run.weights() if after < before else None, before, after, steps, judges)


def _train_with_holdout(run: UserRun, samples: Sequence[Example], judges: range) -> _Judging:
    """Hold out a part of the samples, and return the weights with the lowest held-out loss."""
    order = random.Random(run.config.seed).sample(judges, len(judges))
    count = min(round(run.config.holdout * len(samples)), len(judges) // 2)  # the others are trained on
    held = order[: max(1, count)]
    aside, kept = [samples[i] for i in held], [samples[i] for i in [*order[len(held) :], *range(judges.start)]]
    before = yield from run.begin("all samples but those held out", aside)
    losses, weights = yield from run.evaluated(kept, aside, run.config.steps, keep_below=before)
    best = min(losses, key=losses.__getitem__)
    return Judgement(weights, before, losses[best], best, held)


@dataclass(slots=True)
class UserRun:
    """Training runs on one attached LoRA, all from the same start; only `parameters` is trained.

    The rate is constant after the warm-up, so a run that stops early equals a shorter run.
    """

    config: AdaptConfig
    lora: Attached
    start: LoraWeights
    modules: Sequence[ModuleShape]  # modules of the fused adapter
    below: LowerLayers | None  # layers below the trained ones
    parameters: list[torch.nn.Parameter]
    now: TrainingProgress = TrainingProgress(0, 0, 0.0)

    def enter(self, phase: str) -> None:
        self.now = replace(self.now, phase=phase)

    def begin(self, phase: str, held_out: Sequence[Example]) -> Generator[TrainingProgress, None, float]:
        """Reset the user's LoRA to its start, which changes nothing, and return the held-out loss."""
        self.enter(phase)
        self.lora.put(self.start)
        loss = yield from self.loss(held_out)
        yield replace(self.now, held_out=loss)
        return loss

    def loss(self, examples: Sequence[Example]) -> Generator[TrainingProgress, None, float]:
        """Return the examples' mean loss under the current adapter, as `_loss` does."""
        return (yield from _loss(self.lora.model, examples, self.below, self.now))

    def evaluated(
        self,
        samples: Sequence[Example],
        aside: Sequence[Example],
        steps: int,
        *,
        runs: int = 1,
        stop_early: bool = True,
        keep_below: float = -math.inf,
    ) -> Generator[TrainingProgress, None, tuple[_Losses, LoraWeights | None]]:
        """Train one of `runs` runs and evaluate the held-out loss; `stop_early` ends it when the loss stops falling.

        Return the held-out losses, and the weights with the lowest one if it is below `keep_below`.
        """
        losses: _Losses = {}
        weights = None
        for report in self.train(samples, steps):
            loss = None
            if report.step % EVAL_INTERVAL == 0 or report.step == steps:
                loss = losses[report.step] = yield from self.loss(aside)
                best = min(losses, key=losses.__getitem__)
                if best == report.step and loss < keep_below:
                    weights = self.weights()
                if stop_early and report.step - best >= PATIENCE * EVAL_INTERVAL:
                    steps = report.step
            yield self.count(report, of=steps * runs, held_out=loss)
            if report.step == steps:
                break
        return losses, weights

    def train(self, samples: Sequence[Example], steps: int) -> Iterator[StepReport]:
        """Train from the start, one step per report; raise TrainingError if the loss diverges or becomes NaN."""
        self.lora.put(self.start)
        rate = self.config.learning_rate * (UPPER_HALF_FACTOR if self.below else 1.0)
        plan = TrainPlan(steps, min(BATCH_SIZE, len(samples)), rate, self.config.seed)
        gradient, first = partial(backward, below=self.below), math.nan
        for report in optimise(self.lora.model, self.parameters, samples, plan, rate=_constant, gradient=gradient):
            first = report.loss if report.step == 1 else first
            if not report.loss <= first + MAX_LOSS_RISE:  # also true for NaN
                before = f", but was {first:.4g} at the first step" if report.step > 1 else ""
                raise TrainingError(
                    f"training diverged: the loss is {report.loss:.4g} at step {report.step}{before}: lower the "
                    "learning rate"
                )
            yield report

    def count(self, report: StepReport, of: int, held_out: float | None = None) -> TrainingProgress:
        self.now = replace(self.now, step=self.now.step + 1, of=of, loss=report.loss)
        return replace(self.now, held_out=held_out)

    def weights(self) -> LoraWeights:
        """Return the user's current LoRA, float32 on CPU, with zeros for modules that are not trained."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters):  # not evaluated yet
            raise TrainingError(
                "training diverged: the weights are not finite after the last step: lower the learning rate"
            )
        made, rank = self.lora.weights(), self.start.rank
        a = {m.name: made.a.get(m.name, torch.zeros(rank, m.h_in)) for m in self.modules}
        b = {m.name: made.b.get(m.name, torch.zeros(m.h_out, rank)) for m in self.modules}
        return LoraWeights(rank, a, b)


@contextmanager
def user_run(model: Any, fused: LoraWeights, config: AdaptConfig) -> Iterator[UserRun]:
    """Attach a user LoRA, to the upper half of the layers if it can run alone, which halves the time; then restore."""
    modules = [ModuleShape(name, a.shape[1], fused.b[name].shape[0]) for name, a in fused.a.items()]
    half = upper_half(model, fused.a)
    trained = modules if half is None else [m for m in modules if layer_of(m.name) >= half[1]]
    start = initial_lora(trained, config.rank, config.seed)
    with attached(model, start, frozen=fused) as here:
        below = None if half is None else LowerLayers(model, model.get_submodule(half[0]), half[1])
        yield UserRun(config, here, start, modules, below, here.trainable(train_a=True))


def _constant(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP_STEPS)
