"""A conversation as token ids, ending with the answer; used for training, evaluation and signing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt, its output and the end-of-turn token; ids from index `loss_from` on count in the loss.

    `mixed` has a pair (a, b) for each output token whose probability p the serving makes a p + b; empty: p itself.
    """

    ids: tuple[int, ...]
    loss_from: int
    mixed: tuple[tuple[float, float], ...] = ()

    @property
    def output(self) -> tuple[int, ...]:
        return self.ids[self.loss_from :]

    @property
    def output_tokens(self) -> int:
        return len(self.ids) - self.loss_from


def output_tokens(examples: Iterable[Example]) -> int:
    return sum(example.output_tokens for example in examples)
