"""A user's LoRA in training on a frozen fused adapter: runs of the optimiser, each until it stops improving.

The rate is constant after its warm-up, so that a run stopped early equals a shorter run.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from adapters.errors import TrainingError
from adapters.lora import LoraWeights, ModuleShape
from adapters.training.adapt_config import BATCH_SIZE, LOOK_EVERY, AdaptConfig
from adapters.training.attached import Attached, attached
from adapters.training.example import Example, output_tokens
from adapters.training.forward.lower_layers import LowerLayers, layer_of, upper_half
from adapters.training.loss import row_losses
from adapters.training.trainer import StepReport, initial_lora, optimise

WARM_UP_STEPS = 2

PATIENCE = 2
"""How many looks at the held-out loss without a new low end a run."""

EXPLODED = 5.0
"""Training fails when a step's loss is this many nats a token above the first one's: it will not come back down."""

UPPER_PACE = 1.75
"""The rate's factor where the upper half of the layers trains alone: with it that learns in eight steps about what all
learn at the planned rate; with 1.9 on headlines, with 1.7 on mails."""


@dataclass(frozen=True, slots=True)
class TrainingProgress:
    """How far training is: `step` of `of` over all its runs, that step's loss, and what is being done in a few words.

    `held_out` is the loss on samples that are not trained on after this step, if it was taken.
    """

    step: int
    of: int
    loss: float
    phase: str = ""
    held_out: float | None = None


class Patience:
    """Waits up to `PATIENCE` looks for a held-out loss to reach a new low."""

    def __init__(self) -> None:
        self._best, self._at = math.inf, 0

    def holds(self, step: int, loss: float) -> bool:
        """Whether it is worth going on after this look."""
        if loss < self._best:
            self._best, self._at = loss, step
        return step - self._at < PATIENCE * LOOK_EVERY


class UserRun:
    """Runs of one configuration on one attached LoRA, each from the same start.

    `below` are the layers below those that move, where there are any; everything but `parameters` is frozen.
    """

    def __init__(
        self,
        here: Attached,
        config: AdaptConfig,
        *,
        start: LoraWeights,
        modules: Sequence[ModuleShape],
        below: LowerLayers | None,
    ) -> None:
        self.config = config
        self.model = here.model
        self.parameters = here.trainable(train_a=True)
        self.below = below
        self._rate = config.learning_rate * (UPPER_PACE if below else 1.0)
        self._here, self._start, self._modules = here, start, modules
        self._now = TrainingProgress(0, 0, 0.0)

    def enter(self, phase: str) -> None:
        """Say in a few words what is done from here on."""
        self._now = replace(self._now, phase=phase)

    def begin(self, phase: str, held_out: Sequence[Example]) -> Generator[TrainingProgress, None, float]:
        """Go back to the start, where the user's LoRA changes nothing, and return the held-out loss there."""
        self.enter(phase)
        self._here.put(self._start)
        loss = yield from self.loss(held_out)
        yield replace(self._now, held_out=loss)
        return loss

    def loss(self, examples: Sequence[Example]) -> Generator[TrainingProgress, None, float]:
        """Mean loss of the examples under the adapter as it is now; yields the progress after each row of them."""
        loss = 0.0
        for row_loss in row_losses(self.model, examples, self.below):
            loss += row_loss
            yield self._now
        return loss / output_tokens(examples)

    def train(self, samples: Sequence[Example], steps: int) -> Iterator[StepReport]:
        """One run from the start, a step for each report; TrainingError when the loss explodes or is no number."""
        self._here.put(self._start)
        first = math.nan
        for report in optimise(
            self.model,
            self.parameters,
            samples,
            steps=steps,
            batch_size=min(BATCH_SIZE, len(samples)),
            learning_rate=self._rate,
            seed=self.config.seed,
            rate=_constant,
            below=self.below,
        ):
            first = report.loss if report.step == 1 else first
            if not report.loss <= first + EXPLODED:  # NaN is not below anything
                raise TrainingError(
                    f"training exploded: a loss of {report.loss:.4g} at step {report.step}, {first:.4g} at the first "
                    "step: lower the learning rate"
                )
            yield report

    def count(self, report: StepReport, of: int, held_out: float | None = None) -> TrainingProgress:
        """The progress after one more step, of `of` as far as known, and the held-out loss if it was taken."""
        self._now = replace(self._now, step=self._now.step + 1, of=of, loss=report.loss)
        return replace(self._now, held_out=held_out)

    def weights(self) -> LoraWeights:
        """The user's LoRA as it is now, zero where no module moves, float32 on CPU."""
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.parameters):  # no loss was taken since
            raise TrainingError(
                "training exploded: its last step left weights that are not finite: lower the learning rate"
            )
        made, rank = self._here.weights(), self._start.rank
        a = {m.name: made.a.get(m.name, torch.zeros(rank, m.h_in)) for m in self._modules}
        b = {m.name: made.b.get(m.name, torch.zeros(m.h_out, rank)) for m in self._modules}
        return LoraWeights(rank, a, b)


@contextmanager
def user_run(model: Any, fused: LoraWeights, config: AdaptConfig) -> Iterator[UserRun]:
    """Attach a new user's LoRA on top of a fused adapter in float32; the model is left as it was.

    It adapts the upper half of the layers where that can run alone, which takes half the time. A starts random, B at
    zero.
    """
    modules = [ModuleShape(name, a.shape[1], fused.b[name].shape[0]) for name, a in fused.a.items()]
    half = upper_half(model, fused.a)
    moving = modules if half is None else [m for m in modules if layer_of(m.name) >= half[1]]
    start = initial_lora(moving, config.rank, config.seed)
    with attached(model, start, frozen=fused) as here:
        below = None if half is None else LowerLayers(model, model.get_submodule(half[0]), half[1])
        yield UserRun(here, config, start=start, modules=modules, below=below)


def looks(step: int, steps: int) -> bool:
    """Whether the held-out loss is looked at after this step of a run of `steps`."""
    return step % LOOK_EVERY == 0 or step == steps


def _constant(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP_STEPS)
