"""Phrase tables of answers in progress, on the model's device, and their mixture with its logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bank.lookup.phrases import LONGEST, MAX_PHRASES, NOTHING, START, TrustedPhrases, suffix_hash

WINDOW = LONGEST + 1  # tokens that a step looks at: the newest and the suffix before it


class PhraseSlots:
    """A table for each of S slots, [S, E] on the device, and how often its answer may still use each phrase."""

    def __init__(self, slots: int, vocabulary: int, device: torch.device) -> None:
        size = slots, MAX_PHRASES
        self._vocabulary = vocabulary
        self._suffixes = torch.full(size, -1, dtype=torch.int64, device=device)
        self._tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self._weights = torch.zeros(size, dtype=torch.float32, device=device)
        self._left = torch.zeros(size, dtype=torch.int64, device=device)

    def put(self, slot: int, phrases: TrustedPhrases) -> None:
        """Give a slot to a new answer; phrases with tokens that the model lacks are left out."""
        table = phrases.table
        known = table["token"] < self._vocabulary
        count = int(known.sum())
        self._suffixes[slot] = -1
        for ours, column in (
            (self._suffixes, table["suffix"].astype("i8")),
            (self._tokens, table["token"].astype("i8")),
            (self._weights, phrases.weights),
            (self._left, table["limit"].astype("i8")),
        ):
            ours[slot, :count] = torch.from_numpy(column[known]).to(ours.device, non_blocking=True)

    def count(self, slots: torch.Tensor, windows: torch.Tensor) -> None:
        """Count the phrases that windows [N, K + 1] of tokens end with as used by the answers in `slots` [N]."""
        suffixes, tokens = self._suffixes[slots], self._tokens[slots] == windows[:, -1:]
        used = torch.zeros_like(tokens)
        for length in range(1, WINDOW):
            used |= suffixes == _hashed(windows[:, :-1], length)
        self._left.index_add_(0, slots, -(used & tokens).long())

    def mix(self, logits: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor, windows: torch.Tensor) -> None:
        """Mix the tables in `slots` [N] into `rows` [N] of logits [B, V], after answers that end with `windows`."""
        suffixes, free = self._suffixes[slots], self._left[slots] > 0
        proposing = torch.zeros_like(free)
        for length in range(LONGEST, 0, -1):
            matching = (suffixes == _hashed(windows, length)) & free
            proposing |= matching & ~proposing.any(1, keepdim=True)
        if logits.device.type == "cpu":  # another device would have to be waited for
            some = proposing.any(1)
            if not some.any():
                return
            rows, slots, proposing = rows[some], slots[some], proposing[some]
        part, tokens = logits[rows], self._tokens[slots]
        weights = self._weights[slots] * proposing
        rest = 1 - weights.sum(1, keepdim=True)
        odds = weights / rest.clamp(min=0.01)  # shares that version 0.2 stored may add up to more than 1
        before = part.gather(1, tokens)
        mixed = torch.logaddexp(before, part.logsumexp(1, keepdim=True) + odds.log())
        mixed = torch.where(before.isneginf(), before, mixed)  # a grammar's mask, `min_tokens` and bad words win
        logits[rows] = part.scatter_reduce(1, tokens, mixed, "amax")


def window_of(output: Sequence[int], end: int) -> list[int]:
    """Return the last K + 1 tokens of the first `end` ones of an answer; its beginning counts as one."""
    start = [NOTHING] * LONGEST + [START]
    return (start + list(output[max(0, end - WINDOW) : end]))[-WINDOW:]


def _hashed(windows: torch.Tensor, length: int) -> torch.Tensor:
    hashed: torch.Tensor = suffix_hash(windows[:, -length:].unbind(1), length)
    return hashed[:, None]
