"""Histories whose texts are not kept: an item's text passes through the store until a worker has signed it.

What stays is the mean of the items' embeddings, a hash of each item, which tells a repeat, and the signature in the
profile, to which the worker adds. New items add to this evidence. It starts anew when a PUT brings other items, and for
another embedder or bank, to which it says nothing: then items that were sent before count again.
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

Items = Mapping[str, StoredItem]


@dataclass(frozen=True, slots=True)
class Passing:
    """A change of such a history; items are by id, oldest first."""

    new: Items  # that did not count before
    texts: Items  # that wait for their signature after it
    put: Items  # of these, those to write
    drop: tuple[str, ...]  # names of items and vectors to remove first
    hashes: Sequence[str]  # of all items that count after it
    counted: int  # number of the first of them that counted before; 0 if the evidence starts anew
    removed: int  # number of items that no longer count

    @classmethod
    def of(cls, snapshot: Snapshot, history: Items, most: int, *, is_ours: bool, replaces: bool | None) -> Passing:
        """Return the change to a history, of which `most` items can count; unless `is_ours`, none counts before it."""
        named = {_hash(name, item): name for name, item in history.items()}
        before = [name for name in snapshot.vectors if name != MEAN] if is_ours else []
        known = [] if replaces and named.keys() != set(before) else before
        fresh = [key for key in named if key not in known]
        kept = known[max(0, len(known) + len(fresh) - most) :]
        new = {named[key]: history[named[key]] for key in fresh}
        texts = {name: item for name, item in history.items() if name in new or name in snapshot.items}
        stored, hashes = dict.fromkeys((*snapshot.items, *snapshot.vectors)), [*kept, *fresh]
        stays = {MEAN, *texts, *hashes} if kept else {}
        drop = tuple(name for name in stored if name not in stays)
        return cls(new, texts, new if kept else texts, drop, hashes, len(kept), len({*before} - {*hashes}))

    def vectors(self, snapshot: Snapshot, embedder: str, new: Sequence[Vectors]) -> dict[str, StoredVector]:
        """Return the mean with the new items' embeddings [E], and what else is to be stored among the vectors."""
        rows, weights = [*new], [1] * len(new)
        if self.counted:
            rows, weights = [*rows, snapshot.vectors[MEAN].vector], [*weights, self.counted]
        mean = StoredVector(embedder, as_stored(np.average(rows, axis=0, weights=weights)))
        hashes = dict.fromkeys(self.hashes[self.counted :], StoredVector(embedder, np.zeros(0, np.float32)))
        return {MEAN: mean, **hashes}


def _hash(name: str, item: StoredItem) -> str:
    return hashlib.sha256(orjson.dumps([name, dict(item.fields)], option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]
