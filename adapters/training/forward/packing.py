"""Pack several examples into one row: their common prefix once, then the remainder of each, without padding.

Each remainder attends to the prefix and itself, at its own example's positions, as if the example were alone. Tokens
before the personal part acts are in no row: rows attend to their keys and values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, takewhile
from typing import Any

import torch

from adapters.training.example import Example
from adapters.training.forward.attention import Block, in_blocks
from adapters.training.forward.shared_part import Prefix, SharedPart, shared_part_of

ROW_TOKENS = 512  # maximum tokens per row: enough to keep the processor busy, few enough to stay in its caches
ROW_KEYS = 4 * ROW_TOKENS  # maximum tokens in and before a row
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
    part: SharedPart | None  # what reads the tokens before
    before: list[Prefix]  # the different prefixes that are read before
    spans: list[tuple[int, int]]  # keys before the row that each example sees: the first, and one past the last

    @property
    def shared(self) -> int:
        return self.owners.count(_PREFIX)

    @property
    def keys_before(self) -> int:
        return sum(map(len, self.before))

    def inputs(self, model: Any, *, logits: bool = True) -> dict[str, Any]:
        """Return the model's keyword arguments, with logits only where an output token is predicted."""
        device = next(model.parameters()).device
        inputs: dict[str, Any] = {"input_ids": torch.tensor([self.ids])}
        if logits:
            inputs["logits_to_keep"] = torch.tensor(self.logit_indices)
        if len(self.counts) > 1:
            inputs["attention_mask"] = self._mask(model.dtype)
        if len(self.counts) > 1 or self.before:
            inputs["position_ids"] = torch.tensor([self.positions])
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        if self.part and self.before:
            inputs["past_key_values"] = self.part.cache(model, self.before)
        return inputs

    @contextmanager
    def being_read(self) -> Iterator[None]:
        """Let attention know, while the context is active, that the model reads this row."""
        with in_blocks(self.blocks()):
            yield

    def blocks(self, size: int = BLOCK_IDS) -> list[Block]:
        """Split the row into attention blocks, each with the ranges of keys that it can attend to."""
        blocks, shared, before = [], self.shared, self.keys_before
        for first in range(0, len(self.ids), size):
            last = min(first + size, len(self.ids))
            spans = [self.spans[owner] for owner in set(self.owners[first:last])]
            far = (0, before + shared) if shared else (min(spans)[0], max(end for _, end in spans))
            near = before + self.owners.index(self.owners[first]), before + last
            if near[0] <= far[1]:  # they are contiguous
                far, near = (0, 0), (far[0], near[1])
            blocks.append(Block(first, last, far, near))
        return blocks

    def _mask(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the additive mask [1, 1, T, S]: 0 if the row's token may attend to the column's, else about -∞."""
        owners, keys = torch.tensor(self.owners), torch.arange(self.keys_before)
        begins, ends = torch.tensor(self.spans)[owners].T[:, :, None]
        near = ((owners == _PREFIX) | (owners == owners[:, None])).tril()
        seen = torch.cat([(begins <= keys) & (keys < ends), near], 1)
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]


def pack(model: Any, examples: Sequence[Example], limit: int = ROW_TOKENS) -> list[Row]:
    """Pack the examples, in order, into rows of at most `limit` tokens or a single example.

    Each remainder keeps a token before its first output. If our mask cannot replace the model's, no two share a row.
    """
    part, packs = shared_part_of(model), _packs(model, examples)
    before = [part.prefix(example) if part else () for example in examples]
    shared = max(0, _shared(examples) - len(before[0])) if packs and len(set(before)) == 1 else 0
    rows, seen = list[list[int]](), set[Prefix]()  # places of the examples in each row, and prefixes before the last
    size = keys = shared
    for position, (example, prefix) in enumerate(zip(examples, before, strict=True)):
        own = len(example.ids) - len(prefix) - shared
        new = 0 if prefix in seen else len(prefix)
        if not (packs and rows and size + own <= limit and keys + new + own <= ROW_KEYS):
            rows.append([])
            seen.clear()
            size, keys, new = shared, shared, len(prefix)
        rows[-1].append(position)
        seen.add(prefix)
        size, keys = size + own, keys + new + own
    return [
        _row([examples[position] for position in row], [before[position] for position in row], shared, part)
        for row in rows
    ]


def _packs(model: Any, examples: Sequence[Example]) -> bool:  # whether our mask can replace the model's
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = max((len(example.ids) for example in examples), default=0)
    return not getattr(model, "_is_stateful", False) and all(longest <= window for window in windows if window)


def _shared(examples: Sequence[Example]) -> int:
    """Return the length of the common prefix, which ends before the token that predicts the first output."""
    same = takewhile(lambda column: len(set(column)) == 1, zip(*(example.ids for example in examples), strict=False))
    return min(sum(1 for _ in same), *(example.loss_from - 1 for example in examples))


def _row(examples: list[Example], before: Sequence[Prefix], shared: int, part: SharedPart | None) -> Row:
    """Make a row of examples, each without what is read before."""
    begin = len(before[0])
    distinct = [prefix for prefix in dict.fromkeys(before) if prefix]
    ends = dict(zip(distinct, accumulate(map(len, distinct)), strict=True))
    spans = [(ends.get(prefix, 0) - len(prefix), ends.get(prefix, 0)) for prefix in before]
    ids, positions = list(examples[0].ids[begin : begin + shared]), list(range(begin, begin + shared))
    row = Row(ids, positions, [_PREFIX] * shared, [], [], [], examples, part, distinct, spans)
    for owner, example in enumerate(examples):
        begin = len(before[owner]) + shared
        offset = len(row.ids) - begin
        row.ids.extend(example.ids[begin:])
        row.positions.extend(range(begin, len(example.ids)))
        row.owners.extend([owner] * (len(example.ids) - begin))
        predicted = range(example.loss_from, len(example.ids))
        row.logit_indices.extend(offset + position - 1 for position in predicted)
        row.targets.extend(example.ids[position] for position in predicted)
        row.counts.append(example.output_tokens)
    return row
