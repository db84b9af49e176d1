"""Task templates: LaMP's own words, and names people can find."""

from __future__ import annotations

import pytest

from bank.errors import BankError
from bank.items.tasks import Task, get_task, tasks


def test_every_lamp_task_and_free_chat_are_there() -> None:
    lamp = {task.lamp for task in tasks().values()}
    assert lamp == {"LaMP-1", "LaMP-2", "LaMP-2N", "LaMP-3", "LaMP-4", "LaMP-5", "LaMP-7", None}
    assert {"movie_rating", "product_rating", "chat"} <= set(tasks())


def test_an_unknown_task_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(BankError, match=r"unknown task 'headlines'.*news_headline"):
        get_task("headlines")


SCORE = (
    "What is the score of the following {0} on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without further "
    "explanation. {0}: T"
)


@pytest.mark.parametrize(
    ("name", "turn"),
    [
        ("news_headline", "Generate a headline for the following article: T"),
        ("scholarly_title", "Generate a title for the following abstract of a paper: T"),
        ("product_rating", SCORE.format("review")),
        ("movie_rating", SCORE.format("movie")),
    ],
)
def test_the_turn_is_lamps_own_input(name: str, turn: str) -> None:
    task = get_task(name)
    assert task.input.format_map(dict.fromkeys(task.fields, "T")) == turn


@pytest.mark.parametrize("task", tasks().values(), ids=tasks())
def test_an_item_can_be_embedded_by_the_fields_its_pair_needs_and_quoted_by_those_it_has(task: Task) -> None:
    assert set(task.text) & set(task.pair_fields)
    assert task.memory_fields
    assert set(task.memory_fields) <= set(task.fields)
    assert "{memories}" in task.remembering
    assert "{input}" in task.remembering
