"""What an evaluation runs: methods by name, what is costly for the first so many people only, and records kept."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from bank.errors import BankError
from bank.evaluation.methods import METHODS, Method, curves, default_methods, parse_methods
from bank.evaluation.run import MethodRun, Record, Records
from bank.evaluation.session import EvalOptions
from bank.items.histories import History, Query
from bank.items.tasks import AnswerKind

MERGED = METHODS["merged"]
NAMES = "base,merged,random,stacked,merged@k2"
OPTIONS = EvalOptions(tuple(parse_methods(NAMES)), seeds=2, sample=2, writing=(MERGED,))


def test_a_method_is_found_by_its_name_once() -> None:
    named = {"prior": Method("prior"), "own+history@h16": Method("own", history=16)}
    named |= {"merged:topic": Method("merged:topic"), "merged@k4": Method("merged", k=4)}
    for name, method in {**named, "merged@n5": Method("merged", items=5)}.items():
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
    message = rf"^'{re.escape(name)}' is not a method\. Methods are prior, base, common, task"
    with pytest.raises(BankError, match=message):
        parse_methods(f"base,{name}")


def test_a_habit_is_a_rival_where_answers_are_labels_and_history_everywhere() -> None:
    text, score = ([method.name for method in default_methods(kind)] for kind in ("text", "score"))
    assert score == ["prior", *(name.replace("@h3", "@h9") for name in text)]  # a rating says less than a text
    assert {f"{name}+history@h{n}" for name in ("base", "task", "merged", "stacked", "own") for n in (1, 3)} < set(text)


def test_curves_end_at_what_a_name_holds_and_before_all_items() -> None:
    for anchors, items, points in ((12, 10, "k1 k2 k4 k8 k12 n1 n2 n5"), (500, 2, "k1 k2 k4 k8 k16 k334 n1")):
        names = [method.name for method in curves(anchors, items)]
        assert names == [f"merged@{point}" for point in points.split()]
        assert set(names) <= set(METHODS)


@pytest.mark.parametrize(
    ("place", "kind", "seed", "methods", "predicted", "writing"),
    [
        (1, "text", 0, NAMES, "base,merged,random,stacked", "merged"),
        (2, "text", 0, "base,merged,random", "", ""),
        (1, "score", 0, NAMES, "base,merged,random,stacked", ""),
        (2, "labels", 0, "base,merged,random", "base,merged,random", ""),
        (1, "text", 1, "random,stacked", "random,stacked", ""),
        (2, "text", 1, "random", "", ""),
    ],
)
def test_what_is_costly_is_for_the_sample_and_another_seed_for_what_is_random(
    *, place: int, kind: AnswerKind, seed: int, methods: str, predicted: str, writing: str
) -> None:
    runs = [run for run in OPTIONS.runs(place, kind) if run.seed == seed]
    assert ",".join(run.method.name for run in runs) == methods
    assert ",".join(run.method.name for run in runs if run.predicted) == predicted
    assert ",".join(run.method.name for run in runs if run.texts == OPTIONS.texts) == writing
    assert sum(run.texts for run in runs) == (OPTIONS.texts if writing else 0)
    everybody = replace(OPTIONS, predict=False, sample=None)  # all get everything, and nobody is answered
    assert [run.method.name for run in everybody.runs(9, "text") if run.seed == 0] == NAMES.split(",")
    assert not any(run.predicted for run in everybody.runs(9, "score"))


def test_what_a_record_lacks_is_made_again_and_the_later_one_counts(tmp_path: Path) -> None:
    records, record = Records(tmp_path, "key"), Record("u", "u-0", "merged", 0, 0.5, None, "3", written=["once"])
    user = History("u", (), (Query("u-0", "?", "3"),))
    plain, answering, writing = MethodRun(MERGED), MethodRun(MERGED, predicted=True), MethodRun(MERGED, texts=3)
    assert not records.has_results(user, plain)
    records.add([record])
    assert [records.has_results(user, run) for run in (plain, answering, writing)] == [True, False, False]
    assert not records.has_results(user, replace(plain, seed=1))
    assert not records.has_results(replace(user, queries=(*user.queries, Query("u-1", "?", "3"))), plain)
    records.add([replace(record, prediction="", written=["once", "twice", "thrice"])])
    again = Records(tmp_path, "key")
    assert all(again.has_results(user, run) for run in (plain, answering, writing))
    assert [found.prediction for found in again.all()] == [""]
    assert Records(tmp_path, "other").all() == []
