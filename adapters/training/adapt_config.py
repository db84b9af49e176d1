"""How a user adapter is trained, and how much that reads. Plain Python: the gateway reads it too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from adapters.errors import TrainingError, excerpt

BATCH_SIZE = 4
"""Samples a step."""

LOOK_EVERY = 2
"""Steps between two evaluations of the held-out loss."""

FOLDS = 2
FEW = 20
"""Up to this many samples are folded; of more, a part is kept aside."""


@dataclass(frozen=True, slots=True)
class AdaptConfig:
    """How a user adapter is trained; recorded with the job, so that the same job gives the same bytes.

    The defaults are those with which ten samples of people outside the bank helped most on their later items, over two
    tasks (docs/quality.md). TrainingError names a value that cannot be trained with.

    Attributes:
        steps: most optimiser steps of one run; it ends earlier once nothing more is learnt.
        learning_rate: after the warm-up.
        holdout: share of the samples that is held out if there are many.
        strength: weight of the anchors beneath it, relative to when merged; below 1 only with a common row.
        max_tokens: most tokens that all runs together may read, held-out samples included.
        max_seconds: longest time that one worker trains.
    """

    rank: int = 2
    steps: int = 8
    learning_rate: float = 1e-3
    holdout: float = 0.2
    strength: float = 0.5
    seed: int = 0
    max_tokens: int = 2_000_000
    max_seconds: int = 3600

    def __post_init__(self) -> None:
        for name in ("rank", "steps"):
            value = getattr(self, name)
            _demand(isinstance(value, int) and value > 0, name, value, "a whole number above 0")
        _demand(isinstance(self.seed, int), "seed", self.seed, "a whole number")
        rate, holdout = self.learning_rate, self.holdout
        _demand(isinstance(rate, int | float) and 0 < rate < math.inf, "learning_rate", rate, "a number above 0")
        _demand(isinstance(holdout, int | float) and 0 <= holdout < 1, "holdout", holdout, "from 0 to below 1")

    def tokens_read(self, lengths: Sequence[int]) -> int:
        """Roughly the most tokens that all runs read, in training and held out, of samples of so many tokens each."""
        return math.ceil(self._samples_read(len(lengths)) * sum(lengths) / len(lengths))

    def room_for_past(self, lengths: Sequence[int]) -> int:
        """How many tokens of past items may stand before all samples, so long without them, within `max_tokens`."""
        return max(0, int(self.max_tokens * len(lengths) / self._samples_read(len(lengths))) - sum(lengths))

    def _samples_read(self, count: int) -> int:
        """How many samples all runs read, each as often as it is read."""
        looks = 1 + math.ceil(self.steps / LOOK_EVERY)
        if count == 1:
            return max(1, self.steps // 2) + 2
        if count <= FEW:
            held = [len(range(fold, count, FOLDS)) for fold in range(FOLDS)]
            folds = sum(self.steps * min(BATCH_SIZE, count - aside) + looks * aside for aside in held)
            return folds + self.steps * min(BATCH_SIZE, count)
        return self.steps * BATCH_SIZE + looks * max(1, round(self.holdout * count))


def default_config(room: int, common: bool) -> AdaptConfig:
    """How a job trains by default on a bank that leaves `room` for users' rank, with a common row or without."""
    usual = AdaptConfig()
    return replace(usual, rank=max(1, min(usual.rank, room)), strength=usual.strength if common else 1.0)


def _demand(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise TrainingError(f"{name} {excerpt(value)} cannot be trained with: it must be {wanted}")
