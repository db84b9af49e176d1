"""Several examples in one row: their common beginning, read once, then the rest of each; nothing is padded.

A rest sees the beginning and itself, at its own example's positions: every result is the same as for the example alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch

from adapters.training.example import Example
from adapters.training.forward.attention import Block

ROW_TOKENS = 512  # most ids in a row: enough to keep the processor busy, few enough to stay in its caches
BLOCK_IDS = 128
"""How many ids of a row attend together: fewer compute less that cannot be seen, more keep the processor busy."""

_BEGINNING = -1


@dataclass(frozen=True, slots=True)
class Row:
    ids: list[int]  # [T]
    positions: list[int]  # of each id in its own example
    owners: list[int]  # which example an id belongs to, -1 for the beginning
    places: list[int]  # where the examples' output tokens are predicted, one example after the other
    wanted: list[int]  # those tokens
    counts: list[int]  # how many of them each example has
    examples: list[Example]

    @property
    def shared(self) -> int:
        return self.owners.count(_BEGINNING)

    def inputs(self, model: Any, *, logits: bool = True) -> dict[str, torch.Tensor]:
        """The model's keyword arguments; logits are computed only where an output token is predicted."""
        device = next(model.parameters()).device
        inputs = {"input_ids": torch.tensor([self.ids])}
        if logits:
            inputs["logits_to_keep"] = torch.tensor(self.places)
        if len(self.counts) > 1:
            inputs["position_ids"] = torch.tensor([self.positions])
            inputs["attention_mask"] = self._mask(model.dtype)
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    def blocks(self, size: int = BLOCK_IDS) -> list[Block]:
        """The row in blocks of ids, with what each can see at most."""
        found, shared = [], self.shared
        for first in range(0, len(self.ids), size):
            owner = self.owners[first]
            start = self.owners.index(owner)
            alone = start <= shared  # nothing lies between the beginning and what it sees besides
            last = min(first + size, len(self.ids))
            found.append(Block(first, last, 0, 0, last) if alone else Block(first, last, shared, start, last))
        return found

    def _mask(self, dtype: torch.dtype) -> torch.Tensor:
        """[1, 1, T, T], added to attention scores: 0 where the row's id may see the column's, else as good as -∞."""
        owners = torch.tensor(self.owners)
        seen = ((owners == _BEGINNING) | (owners == owners[:, None])).tril()
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def pack(model: Any, examples: Sequence[Example], limit: int = ROW_TOKENS) -> list[Row]:
    """Rows that hold the examples in their order, each row at most `limit` ids or a single example.

    Each has at least one id before the first that carries loss. Every example has its own row where our mask cannot
    replace the model's: if state is carried from id to id, or an example is longer than sliding attention's window.
    """
    shared, limit = (_shared(examples), limit) if _packs(model, examples) else (0, 0)
    parts: list[list[Example]] = []
    size = 0
    for example in examples:
        own = len(example.ids) - shared
        if parts and size + own <= limit:
            parts[-1].append(example)
            size += own
        else:
            parts.append([example])
            size = shared + own
    return [_row(part, shared) for part in parts]


def _packs(model: Any, examples: Sequence[Example]) -> bool:
    windows = [getattr(model.config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = max((len(example.ids) for example in examples), default=0)
    return not getattr(model, "_is_stateful", False) and all(longest <= window for window in windows if window)


def _shared(examples: Sequence[Example]) -> int:
    """How many leading ids all examples share, the id before the first output token never counted."""
    if not examples:
        return 0
    same = takewhile(lambda column: len(set(column)) == 1, zip(*(example.ids for example in examples), strict=False))
    return max(0, min(sum(1 for _ in same), *(example.loss_from - 1 for example in examples)))


def _row(examples: Sequence[Example], shared: int) -> Row:
    beginning = examples[0].ids[:shared]
    row = Row(list(beginning), list(range(shared)), [_BEGINNING] * shared, [], [], [], list(examples))
    for owner, example in enumerate(examples):
        moved = len(row.ids) - shared
        row.ids.extend(example.ids[shared:])
        row.positions.extend(range(shared, len(example.ids)))
        row.owners.extend([owner] * (len(example.ids) - shared))
        predicted = range(example.loss_from, len(example.ids))
        row.places.extend(moved + place - 1 for place in predicted)
        row.wanted.extend(example.ids[place] for place in predicted)
        row.counts.append(example.output_tokens)
    return row
