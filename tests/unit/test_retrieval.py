"""Past items in the prompt: the relevant ones, in LaMP's words."""

from __future__ import annotations

import pytest

from bank.profile import parse_item
from bank.retrieval import most_relevant, with_history
from bank.tasks import get_task, tasks

NEWS = get_task("news_headline")
TURN = "Generate a headline for the following article: A dog slept through the race."
ITEMS = [
    parse_item({"title": "Cats Win", "text": "A cat won a contest."}, NEWS, 0),
    parse_item({"title": "Dogs Lose", "text": "A dog lost a race."}, NEWS, 1),
    parse_item({"text": "No headline here about a dog and a race."}, NEWS, 2),
]


def test_the_most_relevant_item_stands_before_the_turn_in_lamps_words() -> None:
    assert with_history(NEWS, TURN, ITEMS, 1) == f'"Dogs Lose" is the title for "A dog lost a race.". {TURN}'


def test_several_items_are_joined_the_best_first() -> None:
    turn = with_history(NEWS, TURN, ITEMS, 5)
    assert turn.startswith('"Dogs Lose" is the title for "A dog lost a race.", and "Cats Win" is the title for')
    assert turn.endswith(f". {TURN}")


@pytest.mark.parametrize(("items", "count"), [(ITEMS, 0), ([], 3), (ITEMS[2:], 3)])
def test_without_anything_to_quote_the_turn_stays_as_it_is(items: list[object], count: int) -> None:
    assert with_history(NEWS, TURN, items, count) == TURN  # type: ignore[arg-type]


def test_ready_pairs_are_quoted_as_in_a_chat() -> None:
    pair = parse_item({"input": "Any plans?", "output": "The sea."}, NEWS, 0)
    assert with_history(NEWS, TURN, [pair], 1) == f'"The sea." is the answer to "Any plans?". {TURN}'


def test_of_equally_relevant_texts_the_newest_comes_first() -> None:
    assert most_relevant("zebra", ["a cat", "a dog", "a bird"], 2) == [2, 1]
    assert most_relevant("the", ["the", "a"], 2) == [1, 0]  # nothing but stop words


def test_every_task_can_remember() -> None:
    for task in tasks().values():
        assert task.memory_fields
        assert set(task.memory_fields) <= set(task.fields)
        assert "{memories}" in task.remembering
        assert "{input}" in task.remembering
