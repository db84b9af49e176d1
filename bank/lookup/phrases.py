"""Phrase tables, which say what a person repeats, and how one is mixed into the next token's probabilities.

A *phrase* is a token and the *suffix* before it, one to `LONGEST` tokens of an answer (its beginning counts as one),
that stand in two or more of the person's texts: a habit, not a topic. Where an answer so far ends in suffixes of
phrases, the longest ones propose their tokens: p' = (1 - Σᵢ λₖcᵢ) p + λₖc, where cᵢ is the share of the suffix's
occurrences in the texts that go on with token i, and λₖ the bank's trust in suffixes of k tokens (`PhraseRule`). A
phrase that an answer has used as often as any one of the texts proposes nothing more, so that nothing loops. A person's
n-grams, interpolated with a network, are arXiv 2006.05469's. Suffixes are kept as hashes, so a table does not hold
texts. This module needs numpy alone, for gateways; engines mix on tensors (`server/engine/phrases/`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from adapters.training.example import Example
from bank.items.prompt import answer_ids
from bank.manifest import LONGEST_SUFFIX, BankManifest

LONGEST = LONGEST_SUFFIX  # K
START, NOTHING = -1, -2  # stand for the beginning of an answer, and for what is before it
MAX_BYTES = 4096  # of a person's table
_PHRASE = np.dtype([("suffix", "<u4"), ("token", "<u4"), ("length", "u1"), ("share", "u1"), ("limit", "u1")])
MAX_TOKENS = 1 << 16  # of the texts of a table: half a second's work
MAX_PHRASES = MAX_BYTES // _PHRASE.itemsize
_MOST = 255  # in a byte
_GRAM, _LONG = 8, 16  # tokens that are compared at once; length from which on two texts can be copies of one
_TOKEN_BITS, _TEXT_BITS = 19, 12  # of a token id, and of a text's position, beside 32 of a hash
_MULTIPLIER, _MASK = 1_000_003, 0xFFFF_FFFF

Phrases = npt.NDArray[np.void]
"""A table: [E] of suffix (its hash), token, the suffix's length, share (c in 1/255) and limit, by suffix and token."""


def suffix_hash(tokens: Iterable[Any], length: int) -> Any:
    """Hash a suffix, oldest token first; numpy arrays and torch tensors of int64 are hashed element by element."""
    made: Any = length
    for token in tokens:
        made = made * _MULTIPLIER + token + 3 & _MASK
    return made


def phrase_table(texts: Sequence[Sequence[int]]) -> Phrases:
    """Return the phrases of a person's texts, each as token ids with the end of turn; nearly equal ones count once.

    Texts come oldest first, and the oldest beyond `MAX_TOKENS` are left out. If there is too little room, those that
    stand in most texts are kept, of these the longest.
    """
    texts = texts[::-1][: 1 << _TEXT_BITS]
    sizes = np.cumsum([len(text) for text in texts])
    texts = texts[: int(np.searchsorted(sizes, MAX_TOKENS, "right"))]
    keys, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for position, text in enumerate(_distinct(texts)):
        ids = np.array([NOTHING] * (LONGEST - 1) + [START, *text], np.int64)
        for k in range(1, LONGEST + 1):
            before = [ids[LONGEST - back : len(ids) - back] for back in range(k, 0, -1)]
            known = before[0] != NOTHING
            pair = suffix_hash(before, k) << _TOKEN_BITS | ids[LONGEST:]
            keys.append((pair << _TEXT_BITS | position)[known])
            lengths.append(np.full(int(known.sum()), k))
    in_text, first, counts = np.unique(np.concatenate(keys), return_index=True, return_counts=True)
    pairs, begin, stands = np.unique(in_text >> _TEXT_BITS, return_index=True, return_counts=True)
    length, occurs = np.concatenate(lengths)[first][begin], _reduced(np.add, counts, begin)
    _, of_suffix = np.unique(pairs >> _TOKEN_BITS, return_index=True)
    totals = np.repeat(_reduced(np.add, occurs, of_suffix), np.diff([*of_suffix, len(pairs)]))
    share = _MOST * occurs // totals  # rounded down: the shares of a suffix must not add up to more than 1
    kept = np.flatnonzero((stands > 1) & (share > 0))
    order = np.lexsort((-share[kept], -length[kept], -stands[kept]))
    best = np.sort(kept[order[:MAX_PHRASES]])
    table = np.zeros(len(best), _PHRASE)
    table["suffix"], table["token"] = pairs[best] >> _TOKEN_BITS, pairs[best] & ((1 << _TOKEN_BITS) - 1)
    table["length"], table["share"] = length[best], share[best]
    table["limit"] = np.minimum(_MOST, _reduced(np.maximum, counts, begin)[best])
    return table


def _reduced(how: np.ufunc, values: npt.NDArray[np.int64], begin: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return how.reduceat(values, begin) if len(values) else values


def decode_phrases(raw: bytes) -> Phrases:
    """Return a table that was stored as its bytes; raises ValueError if it cannot be one."""
    if len(raw) % _PHRASE.itemsize or len(raw) > MAX_BYTES:
        raise ValueError(f"a phrase table has whole phrases of {_PHRASE.itemsize} bytes and at most {MAX_BYTES} bytes")
    table = np.frombuffer(raw, _PHRASE)
    if not ((table["length"] > 0) & (table["length"] <= LONGEST)).all():
        raise ValueError(f"a phrase has a suffix of 1 to {LONGEST} tokens")
    return table


@dataclass(frozen=True, slots=True, eq=False)
class TrustedPhrases:
    """A person's table, and the bank's trust in it: λ by length of a suffix."""

    table: Phrases
    trust: Sequence[float]

    @classmethod
    def of(cls, tokenizer: Any, texts: Sequence[str], trust: Sequence[float]) -> Self:
        return cls(phrase_table(answer_ids(tokenizer, texts)), trust)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        """λc of each phrase, [E]."""
        trust = np.asarray(self.trust, np.float32)[self.table["length"] - 1]
        weights: npt.NDArray[np.float32] = trust * self.table["share"].astype(np.float32) / _MOST
        return weights

    def mixed(self, example: Example) -> Example:
        """Return an example whose answer is no part of the table, as it is predicted with the table mixed in."""
        return replace(example, mixed=tuple(said.mixed(self.trust) for said in proposals(self.table, example.output)))


NO_PHRASES = TrustedPhrases(np.zeros(0, _PHRASE), ())


class Reader:
    """Follows one answer through a table."""

    def __init__(self, table: Phrases) -> None:
        self._recent: tuple[int, ...] = (START,)
        self._left = table["limit"].tolist()
        self._by_suffix = defaultdict[int, dict[int, int]](dict)  # positions of phrases, by suffix, then token
        for position, (suffix, token) in enumerate(zip(table["suffix"].tolist(), table["token"].tolist(), strict=True)):
            self._by_suffix[suffix][token] = position

    def proposing(self) -> list[int]:
        """Return the positions of the phrases that propose the next token; empty if there are none."""
        free = ([at for at in matching.values() if self._left[at] > 0] for matching in self._matching())
        return next(filter(None, free), [])

    def read(self, token: int) -> bool:
        """Go on by a token; return whether a phrase had proposed it."""
        continuations = [matching[token] for matching in self._matching() if token in matching]
        is_proposed = not set(continuations).isdisjoint(self.proposing())
        for at in continuations:
            self._left[at] -= 1
        self._recent = (*self._recent, token)[-LONGEST:]
        return is_proposed

    def _matching(self) -> Iterator[dict[int, int]]:
        """Yield the phrases whose suffix the answer ends in, those with the longest first."""
        for length in range(len(self._recent), 0, -1):
            if matching := self._by_suffix.get(suffix_hash(self._recent[-length:], length)):
                yield matching


def as_served(manifest: BankManifest, tokenizer: Any, texts: Sequence[str]) -> Callable[[Example], Example]:
    """Return how examples are predicted for a person with these texts, if their requests choose nothing."""
    if manifest.phrases is None or not manifest.words_default:
        return lambda example: example
    return TrustedPhrases.of(tokenizer, texts, manifest.phrases.trust).mixed


@dataclass(frozen=True, slots=True)
class Proposal:
    """What a table says of one token of a text: nothing if `length` is 0."""

    length: int  # of the suffix
    share: float  # c of the token itself
    shares: float  # sum of c over all proposed tokens

    def mixed(self, trust: Sequence[float]) -> tuple[float, float]:
        """Return (a, b) such that the mixture gives the token the probability a p + b."""
        own = trust[self.length - 1] if self.length else 0.0
        return 1 - own * self.shares, own * self.share


def proposals(table: Phrases, text: Sequence[int]) -> list[Proposal]:
    """Return what a table says of each token of a text that is no part of it."""
    reader, proposals = Reader(table), list[Proposal]()
    for token in text:
        positions = reader.proposing()
        shares = table["share"][positions] / _MOST
        own = shares[table["token"][positions] == token]
        length = int(table["length"][positions[0]]) if positions else 0
        proposals.append(Proposal(length, float(own.sum()), float(shares.sum())))
        reader.read(token)
    return proposals


def _distinct(texts: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
    """Yield the texts, leaving out long ones that share half of their runs of tokens with another."""
    owner: dict[tuple[int, ...], int] = {}
    sizes: dict[int, int] = {}
    for position, text in enumerate(texts):
        runs = {tuple(text[at : at + _GRAM]) for at in range(len(text) - _GRAM + 1)}
        shared = Counter(owner[run] for run in runs if run in owner)
        copies = (other for other, count in shared.items() if 2 * count >= len(runs) + sizes[other] - count)
        if len(text) >= _LONG and next(copies, None) is not None:
            continue
        sizes[position] = len(runs)
        owner |= {run: position for run in runs if run not in owner}
        yield text
