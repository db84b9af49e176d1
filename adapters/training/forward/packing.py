"""Pack several examples into one row: their common prefix once, then the remainder of each, without padding.

Each remainder attends to the prefix and itself, at its own example's positions, as if the example were alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile
from typing import Any

import torch

from adapters.training.attached import personal_tokens
from adapters.training.example import Acts, Example
from adapters.training.forward.attention import Block, in_blocks

ROW_TOKENS = 512  # maximum tokens per row: enough to keep the processor busy, few enough to stay in its caches
BLOCK_IDS = 128  # tokens per attention block: small blocks skip masked pairs, large ones keep the processor busy
_PREFIX = -1


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    ids: list[int]  # [T]
    positions: list[int]  # position of each id in its own example
    owners: list[int]  # index of the example that an id belongs to; -1 for the common prefix
    logit_indices: list[int]  # row indices that predict output tokens, example by example
    targets: list[int]  # output tokens to predict at `logit_indices`
    counts: list[int]  # number of output tokens per example
    examples: list[Example]

    @property
    def shared(self) -> int:
        return self.owners.count(_PREFIX)

    def inputs(self, model: Any, *, logits: bool = True) -> dict[str, torch.Tensor]:
        """Return the model's keyword arguments, with logits only where an output token is predicted."""
        device = next(model.parameters()).device
        inputs = {"input_ids": torch.tensor([self.ids])}
        if logits:
            inputs["logits_to_keep"] = torch.tensor(self.logit_indices)
        if len(self.counts) > 1:
            inputs["position_ids"] = torch.tensor([self.positions])
            inputs["attention_mask"] = self._mask(model.dtype)
        return {name: tensor.to(device) for name, tensor in inputs.items()}

    @contextmanager
    def being_read(self) -> Iterator[None]:
        """Let attention and adapters know, while the context is active, that the model reads this row."""
        with in_blocks(self.blocks()), personal_tokens(lru_cache(self.personal)):
            yield

    def personal(self, acts: Acts, device: torch.device) -> torch.Tensor:
        """Return on which tokens the personal part acts, [T, 1]."""
        begins = torch.tensor([example.personal_from(acts) for example in self.examples])
        owners = torch.tensor(self.owners).clamp(min=0)  # the prefix is shared by all alike
        return (torch.tensor(self.positions) >= begins[owners])[:, None].to(device)

    def blocks(self, size: int = BLOCK_IDS) -> list[Block]:
        """Split the row into attention blocks, each with the range of positions that it can attend to."""
        found, shared = [], self.shared
        for first in range(0, len(self.ids), size):
            owner = self.owners[first]
            start = self.owners.index(owner)
            alone = start <= shared  # the visible positions are contiguous with the prefix
            last = min(first + size, len(self.ids))
            found.append(Block(first, last, 0, 0, last) if alone else Block(first, last, shared, start, last))
        return found

    def _mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the additive mask [1, 1, T, T]: 0 if the row's token may attend to the column's, else about -∞."""
        owners = torch.tensor(self.owners)
        seen = ((owners == _PREFIX) | (owners == owners[:, None])).tril()
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def pack(model: Any, examples: Sequence[Example], limit: int = ROW_TOKENS) -> list[Row]:
    """Pack the examples, in order, into rows of at most `limit` tokens or a single example.

    Each remainder keeps a token before its first output. If our mask cannot replace the model's, no two share a row.
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


def _packs(model: Any, examples: Sequence[Example]) -> bool:  # whether our mask can replace the model's
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = max((len(example.ids) for example in examples), default=0)
    return not getattr(model, "_is_stateful", False) and all(longest <= window for window in windows if window)


def _shared(examples: Sequence[Example]) -> int:
    """Return the length of the common prefix, which ends before the token that predicts the first output.

    If the system prompts' lengths differ, it ends before the shortest does.
    """
    if not examples:
        return 0
    same = takewhile(lambda column: len(set(column)) == 1, zip(*(example.ids for example in examples), strict=False))
    ends = [example.loss_from - 1 for example in examples]
    if len(systems := {example.system for example in examples}) > 1:
        ends += systems
    return max(0, min(sum(1 for _ in same), *ends))


def _row(examples: Sequence[Example], shared: int) -> Row:
    prefix = examples[0].ids[:shared]
    row = Row(list(prefix), list(range(shared)), [_PREFIX] * shared, [], [], [], list(examples))
    for owner, example in enumerate(examples):
        offset = len(row.ids) - shared
        row.ids.extend(example.ids[shared:])
        row.positions.extend(range(shared, len(example.ids)))
        row.owners.extend([owner] * (len(example.ids) - shared))
        predicted = range(example.loss_from, len(example.ids))
        row.logit_indices.extend(offset + place - 1 for place in predicted)
        row.targets.extend(example.ids[place] for place in predicted)
        row.counts.append(example.output_tokens)
    return row
