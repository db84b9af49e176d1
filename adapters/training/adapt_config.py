"""Training settings of user adapters, and the tokens that training reads. The gateway imports this without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapters.errors import TrainingError, excerpt

BATCH_SIZE = 4  # samples per step
EVAL_INTERVAL = 2  # steps between two evaluations of the held-out loss
FOLDS = 2
MAX_SAMPLE_TOKENS = 4096  # of one sample, since the memory of a step grows with the longest
RIVALS = 5  # at most: merged, the common row, the base model, the adapter in use on its own recipe and on the new one
SHOWN_TOKENS = 32  # of each of the two answers that show what a job has changed
MAX_FOLDED = 20  # up to so many samples, all are held out, each in one fold


@dataclass(frozen=True, slots=True)
class AdaptConfig:
    """Settings of one training job, stored with the job to make it reproducible; raises TrainingError if invalid.

    The defaults gave the best results for people outside the bank with ten samples (docs/quality.md).
    """

    rank: int = 2
    steps: int = 6  # maximum per run; a run stops early when the held-out loss no longer falls
    learning_rate: float = 1.4e-3  # after the warm-up
    holdout: float = 0.2  # fraction of the samples that are held out, if they are more than `MAX_FOLDED`
    strength: float = 1.0  # factor on the anchors' merged weights; below 1 only with a common row
    seed: int = 0
    max_tokens: int = 2_000_000  # maximum tokens that all runs read, including held-out samples
    max_seconds: int = 3600  # maximum training time of one worker

    def __post_init__(self) -> None:
        whole = "a whole number above 0"
        for name, of, holds, wanted in (
            ("rank", int, lambda value: value > 0, whole),
            ("steps", int, lambda value: value > 0, whole),
            ("seed", int, lambda value: True, "a whole number"),
            ("learning_rate", int | float, lambda value: 0 < value < math.inf, "a number above 0"),
            ("holdout", int | float, lambda value: 0 <= value < 1, "from 0 to below 1"),
            ("strength", int | float, lambda value: 0 <= value <= 1, "from 0 to 1"),
        ):
            value = getattr(self, name)
            if not isinstance(value, of) or not holds(value):
                raise TrainingError(f"{name} must be {wanted}, got {excerpt(value)}")

    def judges(self, count: int) -> int:
        """Return how many of `count` samples are held out at most."""
        return min(count, max(MAX_FOLDED, round(self.holdout * count)))

    def tokens_read(self, lengths: Sequence[int]) -> int:
        """Estimate the maximum number of tokens read by all runs, given each sample's token count."""
        return math.ceil(self._samples_read(len(lengths)) * sum(lengths) / len(lengths)) + 2 * SHOWN_TOKENS

    def room_for_past(self, lengths: Sequence[int]) -> int:
        """Return how many tokens of past items fit before samples of these lengths, within `max_tokens`."""
        tokens = self.max_tokens - 2 * SHOWN_TOKENS
        return max(0, int(tokens * len(lengths) / self._samples_read(len(lengths))) - sum(lengths))

    def _samples_read(self, count: int) -> int:
        """Return the number of sample reads in all runs, repeated reads included."""
        judges, looks = self.judges(count), RIVALS + math.ceil(self.steps / EVAL_INTERVAL)
        held = [len(range(fold, judges, FOLDS)) for fold in range(FOLDS)]
        folds = sum(self.steps * min(BATCH_SIZE, count - aside) for aside in held)
        return folds + looks * judges + self.steps * min(BATCH_SIZE, count) + 2  # which is answered twice


def default_config(room: int, **given: Any) -> AdaptConfig:
    """Return the default settings for a bank with `room` ranks for user adapters, but for those that are given."""
    usual = AdaptConfig()
    return replace(usual, **{"rank": max(1, min(usual.rank, room))} | given)
