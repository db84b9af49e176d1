"""What is costly is for the first so many people only: who gets it, what is recorded, what the table shows of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from bank.evaluation.methods import METHODS, parse_methods
from bank.evaluation.run import EvalOptions, MethodRun, Record, Records
from bank.evaluation.summary import GOLDS, markdown, summarise, tables, write_lamp_files
from bank.items.histories import History, Query
from bank.items.tasks import AnswerKind, get_task
from server.cli.eval.commands import print_tables

FILMS = get_task("movie_rating")
MERGED = METHODS["merged"]
NAMES = "base,merged,random,stacked,merged@k2"
OPTIONS = EvalOptions(tuple(parse_methods(NAMES)), seeds=2, sample=2, writing=(MERGED,))


def record(user: str, method: str, loss: float, prediction: str | None = None) -> Record:
    return Record("key", user, f"{user}-0", method, 0, loss, prediction, "3")


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


def test_without_predictions_nobody_is_answered_and_without_a_sample_all_get_everything() -> None:
    everybody = replace(OPTIONS, predict=False, sample=None)
    assert [run.method.name for run in everybody.runs(9, "text") if run.seed == 0] == NAMES.split(",")
    assert not any(run.predicted for run in everybody.runs(9, "score"))


def test_what_a_record_lacks_is_made_again_and_the_later_one_counts(tmp_path: Path) -> None:
    records = Records(tmp_path, "key")
    user = History("u", (), (Query("u-0", "?", "3"),))
    plain, answering, writing = MethodRun(MERGED), MethodRun(MERGED, predicted=True), MethodRun(MERGED, texts=3)
    assert not records.has_results(user, plain)
    records.add([replace(record("u", "merged", 0.5), written=["once"])])
    assert [records.has_results(user, run) for run in (plain, answering, writing)] == [True, False, False]
    assert not records.has_results(user, replace(plain, seed=1))
    assert not records.has_results(replace(user, queries=(*user.queries, Query("u-1", "?", "3"))), plain)
    records.add([replace(record("u", "merged", 0.5, ""), written=["once", "twice", "thrice"])])
    again = Records(tmp_path, "key")
    assert all(again.has_results(user, run) for run in (plain, answering, writing))
    assert [found.prediction for found in again.all()] == [""]
    assert Records(tmp_path, "other").all() == []


def shown(records: Sequence[Record]) -> list[list[str]]:
    """Headings and tables in turn, as lines; the caption aside."""
    table = markdown(tables(summarise(records, FILMS), records, FILMS))
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
    records = [record(user, method, loss, "3") for user, method, loss in losses]
    console = Console(width=80)
    with console.capture() as captured:
        print_tables(tables(summarise(records, FILMS), records, FILMS), console)
    lines = captured.get().splitlines()
    assert lines[0].strip() == "9 people"
    assert "…" not in captured.get()
    merged = next(line for line in lines if line.startswith("merged "))
    assert merged.split()[1:] == ["6.010", "0.000", "0.000", "+4.000*", "+3.000*", "+2.000*", "+1.000*", "-2.000*"]


def test_the_leaderboard_gets_empty_answers_and_none_that_were_not_asked_for(tmp_path: Path) -> None:
    records = [record("a", "merged:topic", 1.0, ""), record("b", "merged:topic", 1.0)]
    write_lamp_files(records, FILMS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{GOLDS}.json", "merged-topic.json"]
    assert "b-0" not in (tmp_path / "merged-topic.json").read_text("utf-8")
