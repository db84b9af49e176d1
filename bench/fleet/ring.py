"""The hash ring of vllm-router 0.1.17, reimplemented for simulations of a fleet.

The router hashes with mcrouter's FurcHash over 2^23 - 1 buckets and spreads the bucket over 64 bits with MurmurHash64A;
a session goes to the first virtual node at or after it. `tests/integration/test_fleet.py` compares it with the router.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

VIRTUAL_NODES = 160
"""Number of virtual nodes per engine."""

BUCKETS = (1 << 23) - 1
_SEED = 4193360111
_M, _R = 0xC6A4A7935BD1E995, 47
_WORD = (1 << 64) - 1
_SHIFT, _TRIES = 23, 32

Places = npt.NDArray[np.uint64]


class Ring:
    """The ring of some engines.

    Args:
        urls: the engines' URLs as configured in the router.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        nodes = {place(f"{url}:{node}"): number for number, url in enumerate(urls) for node in range(VIRTUAL_NODES)}
        self._places = np.array(sorted(nodes), dtype=np.uint64)
        self._owners = np.array([nodes[int(at)] for at in self._places])

    def engine_of(self, recipe: str) -> int:
        """Return the number of the engine that serves a recipe while all engines are reachable."""
        return int(self.engines_at(np.array([place(f"header:x-session-id:{recipe}")], dtype=np.uint64))[0])

    def engines_at(self, places: Places) -> npt.NDArray[np.int64]:
        """Return the engines of many places."""
        return self._owners[np.searchsorted(self._places, places) % len(self._places)]


def place(text: str) -> int:
    """Return the place of a text on the ring, 0 to 2^64 - 1."""
    return _murmur(_furc(text.encode()).to_bytes(4, "little"))


def random_places(count: int, generator: np.random.Generator) -> Places:
    """Return `count` random places."""
    return generator.integers(_WORD, size=count, dtype=np.uint64)


def _mixed(word: int) -> int:
    word = word * _M & _WORD
    return (word ^ word >> _R) * _M & _WORD


def _closed(word: int) -> int:
    word = (word ^ word >> _R) * _M & _WORD
    return word ^ word >> _R


def _murmur(data: bytes) -> int:
    word, whole = _SEED ^ len(data) * _M & _WORD, len(data) // 8 * 8
    for at in range(0, whole, 8):
        word = (word ^ _mixed(int.from_bytes(data[at : at + 8], "little"))) * _M & _WORD
    if whole < len(data):
        word = (word ^ int.from_bytes(data[whole:], "little")) * _M & _WORD
    return _closed(word)


def _furc(data: bytes) -> int:
    """Return one of `BUCKETS` buckets, drawn with as many pseudo-random bits as needed."""
    words: list[int] = []

    def bit(at: int) -> int:
        while len(words) <= at >> 6:
            again = _closed((_SEED ^ 8 * _M & _WORD ^ _mixed(words[-1])) * _M & _WORD) if words else _murmur(data)
            words.append(again)
        return words[at >> 6] >> (at & 63) & 1

    depth = BUCKETS.bit_length()
    at = depth
    for _ in range(_TRIES):
        while not bit(at):
            if not depth:
                return 0
            depth -= 1
            at = depth
        at += _SHIFT
        number = 1
        for _ in range(depth - 1):
            number = number << 1 | bit(at)
            at += _SHIFT
        if number < BUCKETS:
            return number
    return 0
