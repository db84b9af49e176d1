"""Names of the methods that are compared."""

from __future__ import annotations

import re

import pytest

from bank.errors import BankError
from bank.evaluation.methods import METHODS, Method, curves, default_methods, parse_methods


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("prior", Method("prior")),
        ("own+history@h16", Method("own", history=16)),
        ("merged:topic", Method("merged:topic")),
        ("merged@k4", Method("merged", k=4)),
        ("merged@n5", Method("merged", items=5)),
    ],
)
def test_a_method_is_found_by_its_name_once(name: str, method: Method) -> None:
    assert parse_methods(f"{name}, {name}") == [method]
    assert method.name == name
    assert method.on_curve is ("@k" in name or "@n" in name)


@pytest.mark.parametrize(
    "name",
    [
        *("", "best", "base:topic", "stacked:topic", "merged:", "merged:luck", "mean@k2", "stacked@n5", "merged@k0"),
        *("merged@x3", "merged@k", "merged+history", "merged+history@h0", "merged+history@h17", "prior+history@h1"),
    ],
)
def test_what_is_no_method_is_named_with_those_that_are(name: str) -> None:
    with pytest.raises(
        BankError, match=rf"^'{re.escape(name)}' is not a method\. Methods are prior, base, common, task"
    ):
        parse_methods(f"base,{name}")


def test_a_habit_is_a_rival_where_answers_are_labels_and_history_everywhere() -> None:
    text, score = ([method.name for method in default_methods(kind)] for kind in ("text", "score"))
    assert score == ["prior", *(name.replace("@h3", "@h9") for name in text)]  # a rating says less than a text
    assert {f"{name}+history@h{n}" for name in ("base", "task", "merged", "stacked", "own") for n in (1, 3)} < set(text)


@pytest.mark.parametrize(
    ("anchors", "items", "ks", "ns"), [(12, 10, (1, 2, 4, 8, 12), (1, 2, 5)), (500, 2, (1, 2, 4, 8, 16, 334), (1,))]
)
def test_curves_end_at_all_anchors_that_a_name_holds_and_before_all_items(
    anchors: int, items: int, ks: tuple[int, ...], ns: tuple[int, ...]
) -> None:
    names = [method.name for method in curves(anchors, items)]
    assert names == [*(f"merged@k{k}" for k in ks), *(f"merged@n{n}" for n in ns)]
    assert set(names) <= set(METHODS)
