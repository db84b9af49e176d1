"""What a change makes of a user's item history; nothing here reads or writes the store.

Changes are idempotent: an item that is stored with the same content keeps its position, and a full history drops older
items before the new ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import orjson

from bank.items.profile import Item
from server.store.profile_record import StoredItem, encode_item

_ITEM_BYTES = 1000  # of an item in the store besides its text: its embedding, and the hashes' own

StoredItems = Mapping[str, StoredItem]  # by id, oldest first


@dataclass(frozen=True, slots=True)
class HistoryLimit:
    items: int
    size_bytes: int  # total size of all fields as JSON


@dataclass(frozen=True, slots=True)
class HistoryDiff:
    """The writes that turn one history into another."""

    put: StoredItems  # new, replaced and moved items
    drop: tuple[str, ...]  # ids of removed items
    changed: int  # number of items added or with new content; moved items do not count


def replace_history(current: StoredItems, given: Sequence[Item], limit: HistoryLimit) -> dict[str, StoredItem]:
    """Return the newest given items within the limit, in the given order."""
    fresh = _newest(_distinct(given), limit)
    if list(fresh) == list(current):  # same items, same order: keep the stored positions
        return {name: StoredItem(current[name].order, fields) for name, fields in fresh.items()}
    return {name: StoredItem(order, fields) for order, (name, fields) in enumerate(fresh.items())}


def add_to_history(current: StoredItems, given: Sequence[Item], limit: HistoryLimit) -> dict[str, StoredItem]:
    """Return the history with the given items added; beyond the limit, drop older items before given ones."""
    distinct = _distinct(given)
    untouched = {name: item.fields for name, item in current.items() if name not in distinct}
    kept = _newest(untouched | distinct, limit)
    merged = {name: StoredItem(item.order, kept[name]) for name, item in current.items() if name in kept}
    order = max((item.order for item in current.values()), default=-1) + 1
    new = [name for name in kept if name not in merged]
    return merged | {name: StoredItem(order, kept[name]) for order, name in enumerate(new, order)}


def diff_histories(before: StoredItems, after: StoredItems) -> HistoryDiff:
    put = {name: item for name, item in after.items() if before.get(name) != item}
    drop = tuple(name for name in before if name not in after)
    moved = sum(name in before and before[name].fields == item.fields for name, item in put.items())
    return HistoryDiff(put, drop, len(put) - moved)


def stored_bytes(history: StoredItems) -> int:
    """Return about what a history takes in the store."""
    return sum(_ITEM_BYTES + len(encode_item(item)) for item in history.values())


def newest_items(items: Sequence[Item], limit: HistoryLimit) -> list[Item]:
    """Return the last items within the limit, of those with the same id the last one."""
    return [Item(name, fields) for name, fields in _newest(_distinct(items), limit).items()]


def _distinct(given: Sequence[Item]) -> dict[str, Mapping[str, str]]:
    """Return fields by id; of items with the same id, keep the last one and its position."""
    distinct: dict[str, Mapping[str, str]] = {}
    for item in given:
        distinct.pop(item.id, None)
        distinct[item.id] = item.fields
    return distinct


def _newest(items: Mapping[str, Mapping[str, str]], limit: HistoryLimit) -> dict[str, Mapping[str, str]]:
    kept: list[str] = []
    room_bytes = limit.size_bytes
    for name in reversed(list(items)[-limit.items :]):
        room_bytes -= len(orjson.dumps(dict(items[name])))
        if room_bytes < 0:
            break
        kept.append(name)
    return {name: items[name] for name in reversed(kept)}
