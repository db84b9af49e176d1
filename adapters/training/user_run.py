"""One run of few-shot training: a user adapter on a frozen fused one, from its start until it stops improving.

The rate is constant after its warm-up, so that a run stopped early equals a shorter run.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from adapters.errors import TrainingError, excerpt
from adapters.lora import LoraWeights
from adapters.training.example import Example, output_tokens
from adapters.training.kinds import InTraining
from adapters.training.loss import row_losses
from adapters.training.trainer import StepReport, TrainPlan, optimise
from adapters.user_adapter import CoreWeights, UserAdapterKind

WARM_UP_STEPS = 2

PATIENCE = 2
"""How many looks at the held-out loss without a new low end a run."""

EXPLODED = 5.0
"""Training fails when a step's loss is this many nats a token above the first one's: it will not come back down."""


@dataclass(frozen=True, slots=True)
class UserPlan:
    """How a user adapter is trained.

    Attributes:
        kind: what is trained.
        rank: R_u of a `lora`; a `core` has the fused adapter's.
        steps: most optimiser steps of one run; it ends sooner when the held-out loss has stopped falling.
        batch_size: samples a step.
        learning_rate: after the warm-up.
        holdout: share of the samples kept aside where there are many.
        every: steps between two looks at the held-out loss.
        seed: for the split, the order, and where A starts.
    """

    kind: UserAdapterKind
    rank: int
    steps: int
    batch_size: int
    learning_rate: float
    holdout: float
    every: int
    seed: int

    def __post_init__(self) -> None:
        """Refuse values that cannot be trained with, before training.

        Raises:
            TrainingError: naming the value that is wrong.
        """
        whole = {"steps": self.steps, "rank": self.rank if self.kind is UserAdapterKind.LORA else 1}
        for name, value in whole.items():
            _demand(isinstance(value, int) and value > 0, name, value, "a whole number above 0")
        _demand(isinstance(self.seed, int), "seed", self.seed, "a whole number")
        rate, holdout = self.learning_rate, self.holdout
        _demand(isinstance(rate, int | float) and 0 < rate < math.inf, "learning_rate", rate, "a number above 0")
        _demand(isinstance(holdout, int | float) and 0 <= holdout < 1, "holdout", holdout, "from 0 to below 1")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far training is.

    Attributes:
        step, of: over all its runs.
        loss: of the last step.
        phase: what is being done, in a few words.
        held_out: loss on samples that are not trained on after this step, if it was taken.
    """

    step: int
    of: int
    loss: float
    phase: str = ""
    held_out: float | None = None


class Patience:
    """Waits up to `PATIENCE` looks for a held-out loss to reach a new low."""

    def __init__(self, every: int) -> None:
        self._wait = PATIENCE * every
        self._best, self._at = math.inf, 0

    def holds(self, step: int, loss: float) -> bool:
        """Whether it is worth going on after this look."""
        if loss < self._best:
            self._best, self._at = loss, step
        return step - self._at < self._wait


class UserRun:
    """Runs of one plan on one attached adapter, each from the same start."""

    def __init__(self, adapter: InTraining, plan: UserPlan) -> None:
        self.plan = plan
        self._adapter = adapter
        self._now = Progress(0, 0, 0.0)

    def enter(self, phase: str) -> None:
        """Begin something else, in a few words."""
        self._now = replace(self._now, phase=phase)

    def loss(self, examples: Sequence[Example]) -> Generator[Progress, None, float]:
        """Mean loss of the examples under the adapter as it is now; yields the progress after each row of them."""
        loss = 0.0
        for row_loss in row_losses(self._adapter.model, examples, self._adapter.below):
            loss += row_loss
            yield self._now
        return loss / output_tokens(examples)

    def reset(self) -> None:
        """Back to the start, where the user adapter changes nothing."""
        self._adapter.reset()

    def train(self, samples: Sequence[Example], steps: int) -> Iterator[StepReport]:
        """One run from the start, one step for each report that is asked for; leave the loop to stop.

        Raises:
            TrainingError: when the loss explodes or is no longer a number.
        """
        self.reset()
        size = min(self.plan.batch_size, len(samples))
        plan = TrainPlan(steps, size, self.plan.learning_rate * self._adapter.pace, self.plan.seed)
        first = math.nan
        here = self._adapter
        for report in optimise(here.model, here.parameters, samples, plan, rate=_constant, below=here.below):
            first = report.loss if report.step == 1 else first
            if not report.loss <= first + EXPLODED:  # NaN is not below anything
                raise TrainingError(
                    f"training exploded: a loss of {report.loss:.4g} at step {report.step}, {first:.4g} at the first "
                    "step: lower the learning rate"
                )
            yield report

    def looks(self, step: int, steps: int) -> bool:
        """Whether the held-out loss is looked at after this step of a run of `steps`."""
        return step % self.plan.every == 0 or step == steps

    def told(self, report: StepReport, of: int, held_out: float | None = None) -> Progress:
        """Count one more step of all runs.

        Args:
            report: the step's.
            of: steps of all runs, as far as known.
            held_out: loss on held-out samples after it, if it was taken.
        """
        self._now = replace(self._now, step=self._now.step + 1, of=of, loss=report.loss)
        return replace(self._now, held_out=held_out)

    def begun(self, held_out: float) -> Progress:
        """The progress where a run begins, with the loss there on held-out samples."""
        return replace(self._now, held_out=held_out)

    def taken(self) -> LoraWeights | CoreWeights:
        """The weights of the adapter as it is now.

        Raises:
            TrainingError: when they are not finite: no loss was taken since the last step.
        """
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self._adapter.parameters):
            raise TrainingError(
                "training exploded: its last step left weights that are not finite: lower the learning rate"
            )
        return self._adapter.weights()


def _demand(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise TrainingError(f"{name} {excerpt(value)} cannot be trained with: it must be {wanted}")


def _constant(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARM_UP_STEPS)
