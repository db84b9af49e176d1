"""How a user adapter is trained, and how much that reads. Plain Python: the gateway reads it too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from adapters.errors import TrainingError, excerpt

BATCH_SIZE = 4  # samples a step
LOOK_EVERY = 2  # steps between two evaluations of the held-out loss
FOLDS = 2
FEW = 20  # up to this many samples are folded; of more, a part is kept aside


@dataclass(frozen=True, slots=True)
class AdaptConfig:
    """Recorded with the job, so that the same job gives the same bytes; TrainingError for a value that cannot be.

    With these defaults ten samples of people outside the bank helped most on their later items, over two tasks
    (docs/quality.md).
    """

    rank: int = 2
    steps: int = 8  # most of one run; it ends earlier once nothing more is learnt
    learning_rate: float = 1e-3  # after the warm-up
    holdout: float = 0.2  # share of the samples that is held out if there are many
    strength: float = 0.5  # of the anchors beneath it, relative to when merged; below 1 only with a common row
    seed: int = 0
    max_tokens: int = 2_000_000  # that all runs together may read, held-out samples included
    max_seconds: int = 3600  # longest time that one worker trains

    def __post_init__(self) -> None:
        whole = "a whole number above 0"
        for name, of, holds, wanted in (
            ("rank", int, lambda value: value > 0, whole),
            ("steps", int, lambda value: value > 0, whole),
            ("seed", int, lambda value: True, "a whole number"),
            ("learning_rate", int | float, lambda value: 0 < value < math.inf, "a number above 0"),
            ("holdout", int | float, lambda value: 0 <= value < 1, "from 0 to below 1"),
        ):
            value = getattr(self, name)
            if not isinstance(value, of) or not holds(value):
                raise TrainingError(f"{name} {excerpt(value)} cannot be trained with: it must be {wanted}")

    def tokens_read(self, lengths: Sequence[int]) -> int:
        """Roughly the most tokens that all runs read, in training and held out, of samples of so many tokens each."""
        return math.ceil(self._samples_read(len(lengths)) * sum(lengths) / len(lengths))

    def room_for_past(self, lengths: Sequence[int]) -> int:
        """How many tokens of past items may stand before all samples of these lengths, within `max_tokens`."""
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
