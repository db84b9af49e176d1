"""How histories change: repeats change nothing, the newest are kept."""

from __future__ import annotations

from typing import Any

import orjson
from hypothesis import given
from hypothesis import strategies as st

from bank.items.profile import Item
from server.gateway.users.profiles import HistoryLimit, add_to_history, diff_histories, replace_history
from server.store.profile_record import StoredItem

FEW = 5
LIMIT = HistoryLimit(FEW, 100)
ITEMS = st.lists(st.builds(lambda name, text: Item(name, {"text": text}), st.sampled_from("abcdefghij"), st.text()))
BATCHES = st.lists(
    st.tuples(st.sampled_from((replace_history, add_to_history)), ITEMS.filter(bool)), min_size=1, max_size=6
)


def histories() -> st.SearchStrategy[dict[str, StoredItem]]:
    """Histories as they come about: by changes from nothing."""

    def grow(batches: list[tuple[type[add_to_history], list[Item]]]) -> dict[str, StoredItem]:
        history: dict[str, StoredItem] = {}
        for change, items in batches:
            history = change(history, items, LIMIT)
        return history

    return BATCHES.map(grow)


def last_of_each(items: list[Item]) -> dict[str, Item]:
    return {item.id: item for item in items}


def in_last_places(items: list[Item]) -> list[tuple[str, Any]]:
    """Each item once, where it stood last."""
    ids = list(dict.fromkeys(item.id for item in reversed(items)))[::-1]
    return [(name, last_of_each(items)[name].fields) for name in ids]


@given(histories(), ITEMS.filter(bool), st.sampled_from((replace_history, add_to_history)))
def test_repeating_a_change_changes_nothing_and_places_are_unique_and_in_order(
    history: dict[str, StoredItem], items: list[Item], change: object
) -> None:
    once = change(history, items, LIMIT)
    twice = change(once, items, LIMIT)
    step = diff_histories(once, twice)
    assert (step.put, step.drop, step.changed) == ({}, (), 0)
    assert list(once) == list(twice)
    orders = [item.order for item in once.values()]
    assert orders == sorted(set(orders))


def newest(contents: list[tuple[str, Any]]) -> dict[str, Any]:
    """The last ones that are within the limit together, by the plainest way there is."""
    for start in range(len(contents) + 1):
        kept = contents[start:]
        if len(kept) <= LIMIT.items and sum(len(orjson.dumps(fields)) for _, fields in kept) <= LIMIT.size_bytes:
            return dict(kept)
    raise AssertionError


@given(histories(), ITEMS)
def test_adding_keeps_the_newest_of_what_was_given_and_then_the_newest_of_the_rest(
    history: dict[str, StoredItem], items: list[Item]
) -> None:
    after = add_to_history(history, items, LIMIT)
    untouched = [(name, item.fields) for name, item in history.items() if name not in last_of_each(items)]
    assert {name: item.fields for name, item in after.items()} == newest(untouched + in_last_places(items))


@given(histories(), ITEMS)
def test_replacing_keeps_the_newest_given_in_their_order(history: dict[str, StoredItem], items: list[Item]) -> None:
    after = replace_history(history, items, LIMIT)
    expected = newest(in_last_places(items))
    assert [(name, item.fields) for name, item in after.items()] == list(expected.items())


def test_an_older_item_does_not_stay_where_a_newer_one_has_no_room() -> None:
    history = add_to_history({}, [Item("small", {"text": "x"})], LIMIT)
    after = add_to_history(history, [Item("large", {"text": "x" * 60}), Item("larger", {"text": "x" * 70})], LIMIT)
    assert list(after) == ["larger"]


@given(histories(), histories())
def test_a_difference_turns_one_history_into_the_other(
    before: dict[str, StoredItem], after: dict[str, StoredItem]
) -> None:
    step = diff_histories(before, after)
    result = {name: item for name, item in before.items() if name not in step.drop} | step.put
    assert result == after
    content = {name: item.fields for name, item in before.items()}, {name: item.fields for name, item in after.items()}
    changed = {name for name in before.keys() | after.keys() if content[0].get(name) != content[1].get(name)}
    assert step.changed == len(changed)


def test_new_content_under_a_known_id_replaces_it_in_its_place() -> None:
    history = add_to_history({}, [Item("a", {"text": "1"}), Item("b", {"text": "2"})], LIMIT)
    after = add_to_history(history, [Item("a", {"text": "new"})], LIMIT)
    assert list(after) == ["a", "b"]
    assert after["a"].fields == {"text": "new"}
    assert diff_histories(history, after).changed == 1
