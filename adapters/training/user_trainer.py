"""Few-shot training of a user adapter on a frozen fused adapter, promoted only if it beats what is served without it.

In each of two folds an adapter is trained without the samples that judge it, on a fused adapter for which they are no
evidence. The other fold's samples choose how many steps count. Then all samples train the adapter that is kept.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from adapters.errors import TrainingError
from adapters.lora import LoraWeights, ModuleShape
from adapters.training.adapt_config import BATCH_SIZE, EVAL_INTERVAL, FOLDS, AdaptConfig
from adapters.training.attached import Attached, attached
from adapters.training.example import Example
from adapters.training.forward.lower_layers import LowerLayers, layer_of, upper_half
from adapters.training.forward.shared_part import SharedPart
from adapters.training.loss import backward, row_losses
from adapters.training.trainer import StepReport, TrainPlan, initial_lora, optimise

WARM_UP_STEPS = 2
MIN_JUDGES = 4  # two in each fold: with fewer, chance decides what is promoted
MARGIN = 1.0  # standard errors by which an adapter must be better, since few samples judge
PATIENCE = 2  # number of evaluations without a new lowest held-out loss after which a run ends
MAX_LOSS_RISE = 5.0  # above the first step, in nats per token: such a run does not recover, so training fails
# Learning-rate factor with which eight steps of the upper half of the layers learn about as much as all layers do (the
# exact factor was 1.9 on headlines and 1.7 on mails).
UPPER_HALF_FACTOR = 1.75
IN_USE = "the adapter in use"
TOO_FEW = (
    "{} samples can be held out, and at least {} are needed to tell whether an adapter is better than what the user is "
    "served without it: send more"
)
NOT_BETTER = (
    "on {} held-out samples the adapter has a loss of {:.3f} ± {:.3f}, and {}, without it, {:.3f}: that is not surely "
    "better. Send more samples, or samples that have more in common"
)


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    step: int  # over all runs
    of: int  # total number of steps
    loss: float  # training loss of the step
    phase: str = ""  # short description of the current run
    held_out: float | None = None  # held-out loss, if evaluated after this step
    shown: tuple[str, ...] = ()  # what `write` returns of a held-out sample


@dataclass(frozen=True, slots=True)
class Beneath:
    """What a user adapter is trained on, and what makes each of what the person is served without it, by name.

    None is the base model. They are made one at a time, since those of a large model take much memory.
    """

    fused: LoraWeights
    rivals: Mapping[str, Callable[[], LoraWeights | None]]
    served: Callable[[Example], Example] = lambda example: example  # a judging sample as the serving predicts it
    shared: SharedPart | None = None


BeneathWithout = Callable[[Sequence[int]], Beneath]
"""Returns what lies beneath for which the samples at these places are no evidence."""


Write = Callable[[int], tuple[str, ...]]
"""Returns texts about the sample at a place, and how the model answers it without what is trained, and with it."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The outcome of training; the losses are of samples that trained nothing of it, in nats per output token."""

    weights: LoraWeights | None  # None if it is not promoted
    before: float | None = None  # loss of the best that the person is served without it; None if nothing was trained
    after: float | None = None  # loss with the user adapter
    steps: int = 0
    reason: str = ""  # why it is not promoted, in words
    served: float | None = None  # loss of the adapter in use, if there is one


@dataclass(frozen=True, slots=True)
class _Fold:
    """Losses of the samples held out in one fold, summed over each one's tokens."""

    tokens: Sequence[int]  # output tokens of each
    by_step: Mapping[int, Sequence[float]]  # under the adapter after this many steps
    rivals: Mapping[str, Sequence[float]]


_Judging = Generator[TrainingProgress, None, Judgement]


@dataclass
class TrainingRun:
    """Training that advances as it is iterated, and ends and restores the model when the loop is left.

    Yields progress after each signature, row and step. `judgement` is None until training has finished.
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
    beneath: BeneathWithout,
    samples: Sequence[Example],
    config: AdaptConfig,
    *,
    judges: Sequence[int] | None = None,
    write: Write | None = None,
) -> TrainingRun:
    """Train a user adapter; TrainingError without samples, or if the loss diverges.

    Only the samples at the places `judges` are held out, by default all. Fewer than `MIN_JUDGES` promote nothing.
    """
    if not samples:
        raise TrainingError("there are no samples: send some")
    judges = range(len(samples)) if judges is None else judges
    return TrainingRun(_training(model, beneath, samples, config, judges, write=write))


def _training(
    model: Any,
    beneath: BeneathWithout,
    samples: Sequence[Example],
    config: AdaptConfig,
    judges: Sequence[int],
    *,
    write: Write | None,
) -> _Judging:
    if len(judges) < MIN_JUDGES:
        return Judgement(None, reason=TOO_FEW.format(len(judges), MIN_JUDGES))
    order = random.Random(config.seed).sample(judges, len(judges))[: config.judges(len(samples))]
    folds, now, steps = list[_Fold](), TrainingProgress(0, 0, 0.0), config.steps
    ground: Beneath | None = None
    below: LowerLayers | None = None
    for number in range(FOLDS):
        held = sorted(order[number::FOLDS])
        kept = [sample for position, sample in enumerate(samples) if position not in held]
        now = replace(now, phase=f"fold {number + 1} of {FOLDS}")
        last, ground = ground, beneath(held)
        yield now
        aside = [ground.served(samples[position]) for position in held]
        rivals = {}
        for name, make in ground.rivals.items():
            with attached(model, lora, shared=ground.shared) if (lora := make()) else nullcontext():
                rivals[name] = yield from _losses(model, aside, None, now)
        tokens = [example.output_tokens for example in aside]
        yield replace(now, held_out=min(map(sum, rivals.values())) / sum(tokens))
        kept_below = below if ground is last else None
        with user_run(model, ground.fused, config, now, kept_below, shared=ground.shared) as run:
            by_step = yield from run.evaluated(kept, aside, steps, stop_early=number == 0)
            if write and number == 0:
                yield replace(run.now, shown=write(min(held, key=lambda position: len(samples[position].ids))))
            now, below = run.now, run.below
        folds.append(_Fold(tokens, by_step, rivals))
        steps = max(by_step)  # all folds as long as the first
    judgement = judge(folds)
    if judgement.reason:
        return judgement
    now = replace(now, phase="all samples")
    last, ground = ground, beneath(())
    yield now
    kept_below = below if ground is last else None
    with user_run(model, ground.fused, config, now, kept_below, shared=ground.shared) as run:
        for report in run.train(samples, judgement.steps):
            yield run.count(report, of=steps * FOLDS + judgement.steps) if report else run.now
        return replace(judgement, weights=run.weights())


def _losses(
    model: Any, examples: Sequence[Example], below: LowerLayers | None, now: TrainingProgress
) -> Generator[TrainingProgress, None, list[float]]:
    """Return each example's loss, summed over its tokens; yield the progress after each row."""
    losses = list[float]()
    for row in row_losses(model, examples, below):
        losses += row
        yield now
    return losses


def judge(folds: Sequence[_Fold]) -> Judgement:
    """Compare the folds' adapters with the best of their rivals, and choose the number of steps for all samples.

    The adapter must be better by `MARGIN` standard errors of the mean difference. Its weights are yet to be trained.
    """
    rivals = {name: np.concatenate([fold.rivals[name] for fold in folds]) for name in folds[0].rivals}
    best = min(rivals, key=lambda name: float(rivals[name].sum()))
    own = np.concatenate([fold.by_step[_best_step([f for f in folds if f is not fold])] for fold in folds])
    tokens, gains = np.concatenate([fold.tokens for fold in folds]), rivals[best] - own
    total, count, gain = tokens.sum(), len(tokens), gains.sum() / tokens.sum()
    error = float(np.sqrt(count / (count - 1) * np.square(gains - gain * tokens).sum()) / total)
    losses = {name: float(each.sum() / total) for name, each in rivals.items()}
    before, after = losses[best], float(own.sum() / total)
    reason = "" if gain > MARGIN * error else NOT_BETTER.format(count, after, error, best, before)
    served = min((loss for name, loss in losses.items() if name.startswith(IN_USE)), default=None)
    return Judgement(None, before, after, _best_step(folds), reason, served)


def _best_step(folds: Sequence[_Fold]) -> int:
    return min(folds[0].by_step, key=lambda step: (sum(sum(fold.by_step[step]) for fold in folds), step))


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
    now: TrainingProgress

    def evaluated(
        self, samples: Sequence[Example], aside: Sequence[Example], steps: int, *, stop_early: bool
    ) -> Generator[TrainingProgress, None, dict[int, list[float]]]:
        """Train one fold and return the losses of what is held out, by step, each summed over its tokens.

        `stop_early` ends the run when their mean no longer falls.
        """
        losses = dict[int, list[float]]()
        tokens, runs = sum(example.output_tokens for example in aside), FOLDS + 1
        for report in self.train(samples, steps):
            if report is None:
                yield self.now
                continue
            loss = None
            if report.step % EVAL_INTERVAL == 0 or report.step == steps:
                losses[report.step] = yield from _losses(self.lora.model, aside, self.below, self.now)
                loss = sum(losses[report.step]) / tokens
                best = min(losses, key=lambda step: sum(losses[step]))
                if stop_early and report.step - best >= PATIENCE * EVAL_INTERVAL:
                    steps = report.step
            yield self.count(report, of=steps * runs, held_out=loss)
            if report.step == steps:
                break
        return losses

    def train(self, samples: Sequence[Example], steps: int) -> Iterator[StepReport | None]:
        """Train from the start, as `optimise`; raise TrainingError if the loss diverges or becomes NaN."""
        self.lora.put(self.start)
        rate = self.config.learning_rate * (UPPER_HALF_FACTOR if self.below else 1.0)
        plan = TrainPlan(steps, min(BATCH_SIZE, len(samples)), rate, self.config.seed)
        gradient, first = partial(backward, below=self.below), math.nan
        for report in optimise(self.lora.model, self.parameters, samples, plan, rate=_constant, gradient=gradient):
            first = report.loss if report and report.step == 1 else first
            if report and not report.loss <= first + MAX_LOSS_RISE:  # also true for NaN
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
def user_run(
    model: Any,
    fused: LoraWeights,
    config: AdaptConfig,
    now: TrainingProgress,
    below: LowerLayers | None = None,
    *,
    shared: SharedPart | None = None,
) -> Iterator[UserRun]:
    """Attach a user LoRA, to the upper half of the layers if it can run alone, which halves the time; then restore.

    `below` is that of an earlier run on the same fused adapter.
    """
    modules = [ModuleShape(name, a.shape[1], fused.b[name].shape[0]) for name, a in fused.a.items()]
    half = upper_half(model, fused.a)
    trained = modules if half is None else [m for m in modules if layer_of(m.name) >= half[1]]
    start = initial_lora(trained, config.rank, config.seed)
    with attached(model, start, frozen=fused, shared=shared) as here:
        if half is not None:
            below = below or LowerLayers(model, model.get_submodule(half[0]), half[1])
        yield UserRun(config, here, start, modules, below, here.trainable(train_a=True), now)


def _constant(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP_STEPS)
