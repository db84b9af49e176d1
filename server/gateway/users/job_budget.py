"""An adapt job that would read too many tokens is refused before it is created: a job's time must be bounded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from server.errors import InvalidRequest
from server.store.samples import AdaptConfig, tokens_read


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
