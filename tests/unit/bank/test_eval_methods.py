"""Names of the methods that are compared."""

from __future__ import annotations

import re

import pytest

from bank.errors import BankError
from bank.evaluation.methods import Method, curves, default_methods, parse_method, parse_methods


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("base", Method("base")),
        ("prior", Method("prior")),
        ("task+history@h1", Method("task", history=1)),
        ("own+history@h16", Method("own", history=16)),
        ("merged", Method("merged")),
        ("merged:topic", Method("merged:topic")),
        ("merged@k4", Method("merged", k=4)),
        ("merged@n5+history@h3", Method("merged", history=3, items=5)),
    ],
)
def test_a_name_is_read_as_it_is_written(name: str, method: Method) -> None:
    assert parse_method(name) == method
    assert method.name == name
    assert method.on_curve is ("@k" in name or "@n" in name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "best", "base:topic", "stacked:topic", "merged:", "merged:luck", "mean@k2", "stacked@n5"),
        *("merged@k0", "merged@x3", "merged@k", "merged+past", "merged+history@h0", "merged+history@h17"),
        "prior+history",
    ],
)
def test_what_is_no_method_is_named_with_those_that_are(name: str) -> None:
    with pytest.raises(
        BankError, match=rf"^'{re.escape(name)}' is not a method\. Methods are prior, base, common, task"
    ):
        parse_methods(f"base,{name}")


def test_each_method_is_taken_once_and_history_alone_is_one_item() -> None:
    methods = parse_methods("base, merged+history,base,merged+history@h1")
    assert [method.name for method in methods] == ["base", "merged+history@h1"]


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
