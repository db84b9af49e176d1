"""Names of the methods that are compared."""

from __future__ import annotations

import pytest

from bank.errors import BankError
from bank.evaluation.methods import Base, EvalMethod, curves, default_methods, parse_method, parse_methods

NAMES = [
    "base",
    "prior",
    "task+history@h1",
    "merged",
    "merged:topic",
    "stacked:evidence+history@h3",
    "merged@k4",
    "merged:signature@n5",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_as_it_is_written(name: str) -> None:
    assert parse_method(name).name == name


def test_a_name_says_what_varies() -> None:
    assert parse_method("merged@k4") == EvalMethod(Base.MERGED, k=4)
    assert parse_method("stacked:topic@n5+history") == EvalMethod(Base.STACKED, "topic", items=5, history=1)
    assert parse_method("own+history@h16") == EvalMethod(Base.OWN, history=16)
    assert [parse_method(name).varied for name in ("merged", "merged@k4", "merged@n5")] == [False, True, True]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "best",
        "base:topic",
        "mean@k2",
        "merged:",
        "merged:luck",
        "merged@k0",
        "merged@x3",
        "merged+past",
        "merged+history@h0",
        "merged+history@h17",
        "prior+history",
    ],
)
def test_what_is_no_method_is_named_with_those_that_are(name: str) -> None:
    with pytest.raises(BankError, match=r"is not a method\. Methods are prior, base, common, task"):
        parse_methods(f"base,{name}")


def test_each_method_is_taken_once() -> None:
    assert [method.name for method in parse_methods("base, merged,base")] == ["base", "merged"]


def test_a_habit_is_a_rival_where_answers_are_labels_and_history_everywhere() -> None:
    text, score = ([method.name for method in default_methods(kind)] for kind in ("text", "score"))
    assert score == ["prior", *(name.replace("@h3", "@h9") for name in text)]  # a rating says less than a text
    assert {f"{name}+history@h{n}" for name in ("base", "task", "merged", "stacked", "own") for n in (1, 3)} < set(text)


def test_curves_end_at_all_anchors_and_before_all_items() -> None:
    names = [method.name for method in curves(12, 10)]
    assert names == [
        *("merged@k1", "merged@k2", "merged@k4", "merged@k8", "merged@k12"),
        *("merged@n1", "merged@n2", "merged@n5"),
    ]
