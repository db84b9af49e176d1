"""How a history changes: pure functions over its items, oldest first.

Repeating a change changes nothing: an item that is there with the same content keeps its place, and when the history
is full it is older items than the ones just given that go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bank.profile import Item
from server.store.profiles import StoredItem

History = Mapping[str, StoredItem]


@dataclass(frozen=True, slots=True)
class Difference:
    """What separates two histories.

    Attributes:
        put: items to write: new, replaced, or moved.
        drop: ids of items to remove.
        changed: how many items came, went, or have other content; moving alone is no change.
    """

    put: dict[str, StoredItem]
    drop: tuple[str, ...]
    changed: int


def replaced(current: History, given: Sequence[Item], limit: int) -> dict[str, StoredItem]:
    """The history that holds the given items alone, the newest `limit` of them, in the order given."""
    fresh = _distinct(given, limit)
    if list(fresh) == list(current):  # the same items in the same order: their places stay as they are
        return {name: StoredItem(current[name].order, item.fields) for name, item in fresh.items()}
    return {name: StoredItem(order, item.fields) for order, (name, item) in enumerate(fresh.items())}


def added(current: History, given: Sequence[Item], limit: int) -> dict[str, StoredItem]:
    """The history with the given items added, cut to `limit`: the oldest that were not given go first."""
    fresh = _distinct(given, limit)
    merged = dict(current)
    order = max((item.order for item in current.values()), default=-1) + 1
    for name, item in fresh.items():
        present = merged.get(name)
        merged[name] = StoredItem(present.order if present else order, item.fields)
        order += present is None
    for name in [name for name in merged if name not in fresh][: max(0, len(merged) - limit)]:
        del merged[name]
    return merged


def difference(before: History, after: History) -> Difference:
    """What must be written to turn one history into the other."""
    put = {name: item for name, item in after.items() if before.get(name) != item}
    drop = tuple(name for name in before if name not in after)
    moved = sum(name in before and before[name].fields == item.fields for name, item in put.items())
    return Difference(put, drop, len(put) - moved + len(drop))


def _distinct(given: Sequence[Item], limit: int) -> dict[str, Item]:
    """The newest `limit` items by id; of items with one id the last counts, and its place."""
    distinct: dict[str, Item] = {}
    for item in given:
        distinct.pop(item.id, None)
        distinct[item.id] = item
    return dict(list(distinct.items())[-limit:])
