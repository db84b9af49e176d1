"""A conversation as token ids that ends with the answer: what training, judging and signing learn from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids of a prompt, the output, and the end of the assistant's turn; from `loss_from` on they carry loss."""

    ids: tuple[int, ...]
    loss_from: int

    @property
    def output_tokens(self) -> int:
        return len(self.ids) - self.loss_from


def output_tokens(examples: Iterable[Example]) -> int:
    return sum(example.output_tokens for example in examples)
