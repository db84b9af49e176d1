"""A conversation as token ids, ending with the answer; used for training, evaluation and signing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum


class Acts(StrEnum):
    """Where the personal part of an adapter begins to act; before, all users of a bank share what the model reads."""

    EVERYWHERE = "everywhere"
    AFTER_SYSTEM = "after_system"  # after the system prompt, with its tools
    ANSWER = "answer"  # from the prompt's last token on, which predicts the answer's first


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt, its output and the end-of-turn token; ids from index `loss_from` on count in the loss.

    `mixed` has a pair (a, b) for each output token whose probability p the serving makes a p + b; empty: p itself.
    `system` is the number of the first tokens that all conversations with this system prompt have.
    """

    ids: tuple[int, ...]
    loss_from: int
    mixed: tuple[tuple[float, float], ...] = ()
    system: int = 0

    @property
    def output(self) -> tuple[int, ...]:
        return self.ids[self.loss_from :]

    def personal_from(self, acts: Acts) -> int:
        """Return the index of the first token on which the personal part acts."""
        if acts is Acts.EVERYWHERE:
            return 0
        last = max(0, self.loss_from - 1)
        return min(self.system, last) if acts is Acts.AFTER_SYSTEM else last

    @property
    def output_tokens(self) -> int:
        return len(self.ids) - self.loss_from


def output_tokens(examples: Iterable[Example]) -> int:
    return sum(example.output_tokens for example in examples)
