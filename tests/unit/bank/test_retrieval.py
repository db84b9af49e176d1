"""Past items in the prompt: the relevant ones, in LaMP's words."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bank.items.profile import Item, parse_item
from bank.items.retrieval import ItemIndex, turn_with_memories
from bank.items.tasks import Task, get_task, tasks

NEWS = get_task("news_headline")
TURN = "Generate a headline for the following article: A dog slept through the race."
ITEMS = [
    parse_item({"title": "Cats Win", "text": "A cat won a contest."}, NEWS, 0),
    parse_item({"title": "Dogs Lose", "text": "A dog lost a race."}, NEWS, 1),
    parse_item({"text": "No headline here about a dog and a race."}, NEWS, 2),
]


def with_history(task: Task, turn: str, items: Sequence[Item], count: int) -> str:
    return turn_with_memories(task, turn, ItemIndex(task, items).memories(turn, count))


def test_the_most_relevant_items_stand_before_the_turn_in_lamps_words_the_best_first() -> None:
    dogs = '"Dogs Lose" is the title for "A dog lost a race."'
    cats = '"Cats Win" is the title for "A cat won a contest."'
    assert with_history(NEWS, TURN, ITEMS, 1) == f"{dogs}. {TURN}"
    assert with_history(NEWS, TURN, ITEMS, 5) == f"{dogs}, and {cats}. {TURN}"


@pytest.mark.parametrize(("items", "count"), [(ITEMS, 0), ([], 3), (ITEMS[2:], 3)])
def test_without_anything_to_quote_the_turn_stays_as_it_is(items: list[Item], count: int) -> None:
    assert with_history(NEWS, TURN, items, count) == TURN


@pytest.mark.parametrize("task", tasks().values(), ids=lambda task: task.name)
def test_what_was_written_for_another_task_is_left_out(task: Task) -> None:
    """The bank that serves somebody may have changed."""
    elsewhere = [Item(name, dict.fromkeys(other.fields, "the sea")) for name, other in tasks().items()]
    assert "the sea" in with_history(task, f"{task.instruction} the sea", elsewhere, 16)


def test_ready_pairs_are_quoted_as_in_a_chat() -> None:
    pair = parse_item({"input": "Any plans?", "output": "The sea."}, NEWS, 0)
    assert with_history(NEWS, TURN, [pair], 1) == f'"The sea." is the answer to "Any plans?". {TURN}'


@pytest.mark.parametrize(
    ("turn", "texts", "best"),
    [
        ("zebra", ["a cat", "a dog", "a bird"], ["a bird", "a dog"]),
        ("the", ["the", "a"], ["a", "the"]),  # nothing but stop words
        ("my cat", ["a cat", "a dog", "a bird"], ["a cat", "a bird"]),
    ],
)
def test_of_equally_relevant_items_the_newest_comes_first(turn: str, texts: list[str], best: list[str]) -> None:
    chat = get_task("chat")
    items = [parse_item({"input": text, "output": "yes"}, chat, place) for place, text in enumerate(texts)]
    assert ItemIndex(chat, items).memories(turn, 2) == [f'"yes" is the answer to "{text}"' for text in best]


def test_what_came_later_is_not_searched() -> None:
    index = ItemIndex(NEWS, [ITEMS[2], *ITEMS[:2], *ITEMS[:2]])
    best = [index.memories("a dog and a cat", 9, before) for before in range(6)]
    assert [len(found) for found in best] == [0, 0, 1, 2, 3, 4]
    assert best[2] == ['"Cats Win" is the title for "A cat won a contest."']
