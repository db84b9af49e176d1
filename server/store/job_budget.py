"""How many tokens an adapt job reads, known before it is one: a job's time must have an end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil

from server.errors import InvalidRequest
from server.store.samples import AdaptConfig

# As `adapters/training/user_trainer.py` and the worker have it, which need torch; a test holds the two together.
BATCH_SIZE = 4
LOOK_EVERY = 2
FOLDS = 2
FEW = 20


@dataclass(frozen=True, slots=True)
class JobBudget:
    """What one job is granted; the fields of `AdaptConfig`."""

    max_tokens: int
    max_seconds: int


def tokens_read(config: AdaptConfig, lengths: Sequence[int]) -> int:
    """About how many tokens the runs of a job read at most, in training and in judging.

    Args:
        config: how it trains.
        lengths: of its samples, in tokens; at least one.
    """
    count, steps = len(lengths), config.steps
    looks = 1 + ceil(steps / LOOK_EVERY)
    if count == 1:
        read = max(1, steps // 2) + 2
    elif count <= FEW:
        held = [len(range(fold, count, FOLDS)) for fold in range(FOLDS)]
        folds = sum(steps * min(BATCH_SIZE, count - aside) + looks * aside for aside in held)
        read = folds + steps * min(BATCH_SIZE, count)
    else:
        read = steps * BATCH_SIZE + looks * max(1, round(config.holdout * count))
    return ceil(read * sum(lengths) / count)


def check_budget(config: AdaptConfig, lengths: Sequence[int]) -> None:
    """Refuse a job that would read more than its configuration grants.

    Raises:
        InvalidRequest: naming `config.steps`, or `samples` where no number of steps would do.
    """
    tokens, budget = tokens_read(config, lengths), config.max_tokens
    if tokens <= budget:
        return
    fitting = (steps for steps in range(config.steps - 1, 0, -1) if _of(config, steps, lengths) <= budget)
    steps = next(fitting, None)
    if steps is None:
        raise InvalidRequest(
            f"samples: {len(lengths)} of {sum(lengths)} tokens together make a job that reads about "
            f"{_of(config, 1, lengths)} tokens in a single step, at most {budget} are granted: send fewer",
            param="samples",
            code="job_too_large",
        )
    raise InvalidRequest(
        f"config.steps {config.steps} makes a job that reads about {tokens} tokens over its {len(lengths)} samples, at "
        f"most {budget} are granted: with {steps} steps it fits",
        param="config.steps",
        code="job_too_large",
    )


def _of(config: AdaptConfig, steps: int, lengths: Sequence[int]) -> int:
    return tokens_read(replace(config, steps=steps), lengths)
