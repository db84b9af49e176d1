"""How many tokens an adapt job would read, estimated before it is created: a job's time must be bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil

from server.errors import InvalidRequest
from server.store.samples import AdaptConfig

# The values of `adapters/training/user_trainer.py` and the worker, which need torch; a test keeps them equal.
BATCH_SIZE = 4
LOOK_EVERY = 2
FOLDS = 2
FEW = 20


def tokens_read(config: AdaptConfig, lengths: Sequence[int]) -> int:
    """Roughly the most tokens that the runs of a job read, in training and on held-out samples.

    Args:
        config: how it trains.
        lengths: of its samples, in tokens; at least one sample.
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
    """Refuse a job that would read more than its configuration allows.

    Raises:
        InvalidRequest: naming `config.steps`, or `samples` if no number of steps would fit.
    """
    tokens, budget = tokens_read(config, lengths), config.max_tokens
    if tokens <= budget:
        return
    fitting = (steps for steps in range(config.steps - 1, 0, -1) if _of(config, steps, lengths) <= budget)
    steps = next(fitting, None)
    if steps is None:
        raise InvalidRequest(
            f"samples: {len(lengths)} samples with {sum(lengths)} tokens in all make a job that reads about "
            f"{_of(config, 1, lengths)} tokens even in a single step, but at most {budget} are allowed: send fewer",
            param="samples",
            code="job_too_large",
        )
    raise InvalidRequest(
        f"config.steps {config.steps} makes a job that reads about {tokens} tokens over its {len(lengths)} samples, "
        f"but at most {budget} are allowed: with {steps} steps it would fit",
        param="config.steps",
        code="job_too_large",
    )


def _of(config: AdaptConfig, steps: int, lengths: Sequence[int]) -> int:
    return tokens_read(replace(config, steps=steps), lengths)
