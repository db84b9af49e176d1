"""How a history changes: pure functions over its items, oldest first.

Repeating a change changes nothing: an item that is there with the same content keeps its place, and a full history
loses older items than those just given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from bank.items.profile import Item
from server.store.profile_record import StoredItem

StoredItems = Mapping[str, StoredItem]


@dataclass(frozen=True, slots=True)
class HistoryLimit:
    """The newest items within both limits are kept; `size_bytes` counts all of them, as JSON of their fields."""

    items: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class HistoryDiff:
    """What turns one history into another.

    Attributes:
        put: items to write: new, replaced, or moved.
        drop: ids of items to remove.
        changed: how many items were added, removed, or have new content; a move alone does not count.
    """

    put: dict[str, StoredItem]
    drop: tuple[str, ...]
    changed: int


def replaced(current: StoredItems, given: Sequence[Item], limit: HistoryLimit) -> dict[str, StoredItem]:
    """The given items alone, the newest within the limit, in the order given."""
    fresh = _newest(_distinct(given), limit)
    if list(fresh) == list(current):  # the same items in the same order: their places stay as they are
        return {name: StoredItem(current[name].order, fields) for name, fields in fresh.items()}
    return {name: StoredItem(order, fields) for order, (name, fields) in enumerate(fresh.items())}


def added(current: StoredItems, given: Sequence[Item], limit: HistoryLimit) -> dict[str, StoredItem]:
    """The history with the given items added; beyond the limit, the oldest that were not given go first."""
    distinct = _distinct(given)
    untouched = {name: item.fields for name, item in current.items() if name not in distinct}
    kept = _newest(untouched | distinct, limit)
    merged = {name: StoredItem(item.order, kept[name]) for name, item in current.items() if name in kept}
    order = max((item.order for item in current.values()), default=-1) + 1
    new = [name for name in kept if name not in merged]
    return merged | {name: StoredItem(order, kept[name]) for order, name in enumerate(new, order)}


def difference(before: StoredItems, after: StoredItems) -> HistoryDiff:
    put = {name: item for name, item in after.items() if before.get(name) != item}
    drop = tuple(name for name in before if name not in after)
    moved = sum(name in before and before[name].fields == item.fields for name, item in put.items())
    return HistoryDiff(put, drop, len(put) - moved + len(drop))


def _distinct(given: Sequence[Item]) -> dict[str, Mapping[str, str]]:
    """Fields by id; of items with the same id the last one counts, at its place."""
    distinct: dict[str, Mapping[str, str]] = {}
    for item in given:
        distinct.pop(item.id, None)
        distinct[item.id] = item.fields
    return distinct


def _newest(items: Mapping[str, Mapping[str, str]], limit: HistoryLimit) -> dict[str, Mapping[str, str]]:
    """The last items, as many as the limit allows."""
    kept: list[str] = []
    room_bytes = limit.size_bytes
    for name in reversed(list(items)[-limit.items :]):
        room_bytes -= len(orjson.dumps(dict(items[name])))
        if room_bytes < 0:
            break
        kept.append(name)
    return {name: items[name] for name in reversed(kept)}
