"""Histories whose texts are not kept: an item's text passes through the store until a worker has signed it.

What stays is the mean of the items' embeddings, the hash of each item, which tells a repeat, and in the profile the
signature, to which the worker adds. New items add to this evidence. It starts anew when a PUT brings other items, and
when it is of another embedder or bank, for which it is worth nothing: so all texts can be sent again then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import orjson

from bank.items.profile import Vectors
from server.store.profile_record import StoredItem, StoredVector, as_stored
from server.store.profiles import Snapshot

MEAN = ""  # the mean's name among the stored vectors; the others there are hashes, without a vector
_NO_VECTOR = np.zeros(0, np.float32)


@dataclass(frozen=True, slots=True)
class Passing:
    """A change of such a history."""

    new: Mapping[str, StoredItem]  # items that did not count before, by id
    texts: Mapping[str, StoredItem]  # that wait for their signature
    hashes: Sequence[str]  # of the items that count from now on
    counted: Sequence[str]  # of those among them that counted before
    starts_anew: bool
    removed: int  # number of items that no longer count

    @classmethod
    def of(
        cls,
        snapshot: Snapshot,
        history: Mapping[str, StoredItem],
        most: int,
        *,
        is_ours: bool,
        replaces: bool,
        signs: bool,
    ) -> Passing:
        """Return the change to a history, in which at most `most` items count.

        Nothing counts before it unless `is_ours`; texts wait only if the bank `signs` them.
        """
        named = {_hash(name, item): name for name, item in history.items()}
        before = [name for name in snapshot.vectors if name != MEAN] if is_ours else []
        starts_anew = not before or (replaces and named.keys() != set(before))
        new = {name: history[name] for key, name in named.items() if starts_anew or key not in before}
        waiting = {name: item for name, item in history.items() if name in new or name in snapshot.items}
        counted = [] if starts_anew else before[max(0, len(before) + len(new) - most) :]
        hashes = [*counted, *(key for key, name in named.items() if name in new)]
        removed = sum(key not in hashes for key in before)
        return cls(new, waiting if signs else {}, hashes, counted, starts_anew, removed)

    def written(self, snapshot: Snapshot) -> tuple[Mapping[str, StoredItem], tuple[str, ...]]:
        """Return the texts to put, and the names of what is dropped before that."""
        stored = dict.fromkeys((*snapshot.items, *snapshot.vectors))
        if self.starts_anew:
            return self.texts, tuple(stored)
        put = {name: item for name, item in self.texts.items() if name in self.new}
        return put, tuple(name for name in stored if name != MEAN and name not in {*self.texts, *self.hashes})

    def vectors(self, snapshot: Snapshot, embedder: str, new: Vectors) -> dict[str, StoredVector]:
        """Return what is stored beside the texts, of the new items' embeddings [n, E] and the mean so far."""
        rows, weights = list(new), [1] * len(new)
        if self.counted:
            rows, weights = [*rows, snapshot.vectors[MEAN].vector], [*weights, len(self.counted)]
        mean = as_stored(np.average(rows, axis=0, weights=weights))
        fresh = dict.fromkeys(self.hashes[len(self.counted) :], StoredVector(embedder, _NO_VECTOR))
        return {MEAN: StoredVector(embedder, mean), **fresh}


def _hash(name: str, item: StoredItem) -> str:
    content = orjson.dumps([name, dict(item.fields)], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(content).hexdigest()[:32]
