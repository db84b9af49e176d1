"""What is costly is for the first so many people only: who gets it, what is recorded, what the table shows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bank.evaluation.methods import parse_method, parse_methods
from bank.evaluation.records import Record, Records
from bank.evaluation.report.lamp_files import GOLDS, write_lamp_files
from bank.evaluation.report.summary import markdown, summarise, tables
from bank.evaluation.run import EvalOptions
from bank.items.tasks import AnswerKind, get_task
from server.cli.eval.tables import print_tables

METHODS = "base,merged,stacked,merged@k2"
OPTIONS = EvalOptions(tuple(parse_methods(METHODS)), (0, 1), predict=True, sample=2)


def record(user: str, method: str, loss: float, prediction: str | None = None) -> Record:
    return Record("key", user, f"{user}-0", method, 0, loss, prediction, "3")


def test_training_and_curves_are_for_the_sample_and_the_rest_for_all() -> None:
    assert [method.name for method in OPTIONS.methods_of(1)] == METHODS.split(",")
    assert [method.name for method in OPTIONS.methods_of(2)] == ["base", "merged"]
    assert OPTIONS.pieces(5) == 2 * (2 * 4 + 3 * 2)


@pytest.mark.parametrize(
    ("place", "method", "kind", "asked"),
    [
        (1, "merged", "text", True),
        (2, "merged", "text", False),
        (2, "merged", "score", True),
        (2, "merged", "labels", True),
        (0, "merged@k2", "score", False),
    ],
)
def test_texts_are_asked_of_the_sample_and_short_answers_of_all(
    place: int, method: str, kind: AnswerKind, asked: bool
) -> None:
    assert OPTIONS.predicts(place, parse_method(method), kind) is asked


@pytest.mark.parametrize(
    ("place", "method", "kind", "writes"),
    [
        (1, "merged", "text", True),
        (2, "merged", "text", False),
        (1, "base", "text", False),
        (1, "merged", "score", False),
    ],
)
def test_the_methods_that_write_at_length_do_so_for_the_sample_where_answers_are_free(
    place: int, method: str, kind: AnswerKind, writes: bool
) -> None:
    options = replace(OPTIONS, writing=(parse_method("merged"),))
    assert options.writes(place, parse_method(method), kind) is writes


def test_a_record_with_fewer_texts_than_wanted_is_made_again(tmp_path: Path) -> None:
    records = Records(tmp_path, "key")
    records.add([replace(record("u", "merged", 0.5), written=["once"])])
    assert records.has("u", "merged", 0, 1, predicted=False, texts=1)
    assert not records.has("u", "merged", 0, 1, predicted=False, texts=3)


def test_a_record_without_the_wanted_prediction_is_made_again_and_the_later_one_counts(tmp_path: Path) -> None:
    records = Records(tmp_path, "key")
    records.add([record("u", "merged", 0.5)])
    assert records.has("u", "merged", 0, 1, predicted=False)
    assert not records.has("u", "merged", 0, 1, predicted=True)
    records.add([record("u", "merged", 0.5, "")])
    assert Records(tmp_path, "key").has("u", "merged", 0, 1, predicted=True)
    assert [found.prediction for found in Records(tmp_path, "key").all()] == [""]


def shown(records: Sequence[Record]) -> list[list[str]]:
    """Headings and tables in turn, as lines; the caption aside."""
    task = get_task("movie_rating")
    table = markdown(tables(summarise(records, task), records, task))
    return [block.splitlines() for block in table.strip().split("\n\n")[:-1]]


def test_a_second_table_has_all_methods_over_the_sample() -> None:
    everyone = [record(user, method, 1.0, "3") for user in "abc" for method in ("base", "merged")]
    first, _, second, rows = shown([*everyone, record("a", "stacked", 0.5, "3"), record("b", "stacked", 0.5, "3")])
    assert (first, second) == (["**3 people**"], ["**2 of them**"])
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["base", "merged", "stacked"]


def test_metrics_are_shown_where_everybody_of_the_table_was_answered() -> None:
    predictions = {"a": "3", "b": "2", "c": None}
    records = [record(user, method, 1.0, predictions[user]) for user in "abc" for method in ("base", "merged")]
    first, table, second, rows = shown(records)
    assert (first, second) == (["**3 people**"], ["**2 of them**"])
    assert "mae" not in table[0]
    assert "mae" in rows[0]
    assert "| 0.5000 |" in rows[2]


def test_a_terminal_shows_all_columns_in_eighty_and_stars_what_counts() -> None:
    methods = ("base", "task", "mean", "random", "merged:topic", "merged", "stacked", "own")
    losses = [(user, method, place + ord(user) / 100) for place, method in enumerate(methods) for user in "abcdefghi"]
    task = get_task("movie_rating")
    records = [record(user, method, loss, "3") for user, method, loss in losses]
    console = Console(width=80)
    with console.capture() as captured:
        print_tables(tables(summarise(records, task), records, task), console)
    lines = captured.get().splitlines()
    assert lines[0].strip() == "9 people"
    assert "…" not in captured.get()
    merged = next(line for line in lines if line.startswith("merged "))
    assert merged.split()[1:] == ["6.010", "0.000", "0.000", "+4.000*", "+3.000*", "+2.000*", "+1.000*", "-2.000*"]


def test_the_leaderboard_gets_empty_answers_and_none_that_were_not_asked_for(tmp_path: Path) -> None:
    records = [record("a", "merged:topic", 1.0, ""), record("b", "merged:topic", 1.0)]
    write_lamp_files(records, get_task("movie_rating"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{GOLDS}.json", "merged-topic.json"]
    assert "b-0" not in (tmp_path / "merged-topic.json").read_text("utf-8")
