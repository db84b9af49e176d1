"""An evaluation: the methods it runs for whom, the records it keeps, metrics, intervals, tables, voices."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from bank.errors import BankError
from bank.items.histories import History, Query
from bank.items.profile import Item
from bank.items.tasks import AnswerKind, get_task
from evaluation.authorship import GOLD, authorship, authorship_table
from evaluation.intervals import Interval, compare_together, holm, over_users, sign_flip_p
from evaluation.methods import METHODS, Method, curves, default_methods, parse_methods
from evaluation.pictures import prices_figure
from evaluation.run import MethodRun, Record, Records
from evaluation.session import EvalOptions
from evaluation.summary import (
    CAPTION,
    GOLDS,
    MethodRow,
    lamp_metrics,
    markdown,
    summarise,
    tables,
    write_lamp_files,
)
from server.cli.eval import print_tables

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
        *("", "best", "base:topic", "stacked:topic", "merged:", "merged:luck", "common@k2", "stacked@n5", "merged@k0"),
        *("merged@x3", "merged@k", "merged+history", "merged+history@h0", "merged+history@h17", "prior+history@h1"),
    ],
)
def test_what_is_no_method_is_named_with_those_that_are(name: str) -> None:
    message = rf"^'{re.escape(name)}' is not a method\. Methods are prior, base, common, task"
    with pytest.raises(BankError, match=message):
        parse_methods(f"base,{name}")


def test_default_methods_and_curves_fit_the_kind_of_answers() -> None:
    text, score = ([method.name for method in default_methods(kind)] for kind in ("text", "score"))
    plain = [name for name in text if not name.endswith("+words")]
    assert score == ["prior", *(name.replace("@h3", "@h9") for name in plain)]  # a rating says less than a text
    assert {f"{name}+words" for name in plain if name.startswith(("common", "merged", "stacked", "own"))} < set(text)
    assert {f"{name}+history@h{n}" for name in ("base", "task", "merged", "stacked", "own") for n in (1, 3)} < set(text)
    doubled = [f"k{2**n}" for n in range(9)]
    for anchors, items, ks, ns in ((12, 10, [*doubled[:4], "k12"], "n1 n2 n5"), (500, 2, [*doubled, "k334"], "n1")):
        names = [method.name for method in curves(anchors, items)]
        assert names == [f"{adapter}@{k}" for k in ks for adapter in ("merged", "mean")] + [
            f"merged@{n}" for n in ns.split()
        ]
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
def test_costly_runs_use_the_sample_and_random_ones_more_seeds(
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


def test_incomplete_record_is_made_again_and_the_later_counts(tmp_path: Path) -> None:
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


TAGS, FILMS, NEWS, CHAT = (get_task(name) for name in ("movie_tagging", "movie_rating", "news_headline", "chat"))


def record(user: str, method: str, loss: float = 1.0, prediction: str | None = None, **more: Sequence[str]) -> Record:
    return Record(user, f"{user}-0", method, 0, loss, prediction, "3", **more)  # type: ignore[arg-type]


def of_users(losses: dict[str, Sequence[float]]) -> list[Record]:
    return [record(f"u{user}", method, loss) for method, each in losses.items() for user, loss in enumerate(each)]


def shown(records: Sequence[Record]) -> list[list[str]]:
    """Headings and tables in turn, as lines, and the caption."""
    table = markdown(tables(summarise(records, FILMS), records, FILMS))
    return [block.splitlines() for block in table.strip().split("\n\n")]


def test_score_errors_are_means_and_non_numbers_are_worst() -> None:
    for prediction, gold, error in (("4", 2, 2), (" 3.5\n", 2, 1.5), ("four", 2, 3), ("", 4, 3), ("nan", 5, 4)):
        assert lamp_metrics(FILMS, [prediction], [str(gold)])["mae"] == error
    found = lamp_metrics(FILMS, ["4", "2", "no idea"], ["5", "2", "1"])
    assert found == {"mae": pytest.approx((1 + 0 + 4) / 3), "rmse": pytest.approx(math.sqrt((1 + 0 + 16) / 3))}


def test_labels_come_from_the_instruction_and_others_are_wrong() -> None:
    assert TAGS.labels[:2] == ("sci-fi", "based on a book")
    assert len(TAGS.labels) == len(get_task("news_category").labels) == 15
    assert NEWS.labels == FILMS.labels == ()
    found = lamp_metrics(TAGS, [" sci-fi ", "comedy", "comedy", "scifi"], ["sci-fi", "sci-fi", "comedy", "violence"])
    # sci-fi: precision 1, recall 1/2, F 2/3; comedy: 1/2 and 1, F 2/3; violence: 0; twelve others: 0.
    assert found == {"accuracy": 0.5, "f1": pytest.approx((2 / 3 + 2 / 3) / 15)}


def test_rouge_stems_and_counts_subsequences() -> None:
    # Stemmed: {the, cat, sat} against {the, cat, was, sit, on, mat}: 2 of 3 and 2 of 6.
    stemmed = 2 * (2 / 3) * (2 / 6) / (2 / 3 + 2 / 6)
    found = lamp_metrics(NEWS, ["the cats sat"], ["the cat was sitting on mats"])
    assert found == {"rouge1": pytest.approx(stemmed), "rougeL": pytest.approx(stemmed)}
    assert lamp_metrics(NEWS, ["cat the"], ["the cat"]) == {"rouge1": 1.0, "rougeL": 0.5}
    assert lamp_metrics(NEWS, [""], ["the cat"]) == {"rouge1": 0.0, "rougeL": 0.0}
    for text in ("кошка спит", "猫が寝ている"):
        assert lamp_metrics(NEWS, [text], [text]) == {"rouge1": 1.0, "rougeL": 1.0}


@pytest.mark.filterwarnings("error")
def test_interval_is_reproducible_and_mirrors_with_the_sign() -> None:
    differences = np.random.default_rng(2).exponential(size=12)
    found, other = over_users(differences), over_users(-differences)
    assert found == over_users(differences)
    assert (found.mean, found.n) == (pytest.approx(differences.mean()), 12)
    assert (found.low, found.high) == pytest.approx((-other.high, -other.low))
    plain = stats.bootstrap((differences,), np.mean, method="percentile", rng=np.random.default_rng(0))
    assert found.high > plain.confidence_interval.high  # it corrects for the long tail on the right
    for alike in ([0.25], [0.0] * 5, [0.3 - 0.1, 0.2, 0.7 - 0.5]):  # nothing can be resampled
        found = over_users(alike)
        assert found == Interval(found.mean, found.mean, found.mean, len(alike))
        assert found.mean == pytest.approx(alike[0])


def test_sign_flips_are_exact_for_few_and_like_t_test_for_many() -> None:
    sums = np.array(list(product((-1, 1), repeat=5))) @ (1, -2, 3, 4, 5)
    extreme = float(np.mean(np.abs(sums) >= 11))
    rows = ([1, -2, 3, 4, 5], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0])
    assert list(map(sign_flip_p, rows)) == pytest.approx([extreme, 2 / 32, 1.0])
    assert sign_flip_p([0.5]) == 1.0
    many = np.random.default_rng(6).normal(0.3, 1.0, 60)
    assert sign_flip_p(many) == pytest.approx(stats.ttest_1samp(many, 0).pvalue, abs=0.01)


def test_holm_makes_a_lone_sure_difference_unsure_among_many() -> None:
    # 0.01 × 4, 0.02 × 3, then 0.03 × 2 = 0.06 and 0.04 × 1, which is raised to the one before.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert (holm([0.6, 0.7]), holm([])) == ([1.0, 1.0], [])
    chance = np.random.default_rng(5)
    gain = chance.normal(-0.8, 1.0, 12)
    alone = compare_together({"gain": gain})["gain"]
    assert alone.significant and alone.high < 0
    among = compare_together({"gain": gain, **{f"noise {n}": chance.normal(0, 1, 12) for n in range(9)}})["gain"]
    assert (among.low, among.high) == (alone.low, alone.high)
    assert not among.significant
    assert among.p == pytest.approx(10 * (alone.p or 0))
    assert "*" in str(alone) and "*" not in str(among)


def test_column_is_tested_together_without_curve_points() -> None:
    chance = np.random.default_rng(3)
    losses = {name: chance.normal(1, 0.3, 10) for name in ("task", "mean", "merged", "merged@k2", "base")}
    losses["stacked"] = losses["merged"][:4]
    rows = {row.method: row for row in summarise(of_users(losses), FILMS)}
    column = ("mean", "merged", "base")
    p = [sign_flip_p(np.subtract(losses[name], losses["task"])) for name in column]
    assert [rows[name].against["task"].p for name in column] == pytest.approx(holm(p))
    assert rows["merged@k2"].against["task"].p is rows["stacked"].against["task"].p is None
    assert rows["merged"].against["merged@k2"].p is None
    assert rows["stacked"].against["merged"] == Interval(0, 0, 0, 4)


def test_table_is_bold_for_sure_differences_and_explains_it() -> None:
    chance = np.random.default_rng(4)
    task = chance.normal(1, 0.3, 12)
    losses = {"task": task, "merged": task - 0.3 + chance.normal(0, 0.1, 12), "own": task + chance.normal(0, 0.1, 12)}
    *_, table, caption = shown(of_users(losses))
    cells = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in table}
    against_task = cells["method"].index("loss against task")
    assert cells["merged"][against_task].startswith("**-0.")
    assert "**" not in cells["own"][against_task]
    assert caption == [CAPTION]


def test_second_table_covers_the_sample_with_its_metrics() -> None:
    everyone = [record(user, method, 1.0, "3") for user in "abc" for method in ("base", "merged")]
    first, _, second, rows, _ = shown([*everyone, *(record(user, "stacked", 0.5, "3") for user in "ab")])
    assert (first, second) == (["**3 people**"], ["**2 of them**"])
    assert [row.split("|")[1].strip() for row in rows[2:]] == ["base", "merged", "stacked"]
    answers = {"a": "3", "b": "2", "c": None}
    first, table, second, rows, _ = shown([replace(each, prediction=answers[each.user_id]) for each in everyone])
    assert (first, second) == (["**3 people**"], ["**2 of them**"])
    assert ("mae" in table[0], "mae" in rows[0], "| 0.5000 |" in rows[2]) == (False, True, True)


def test_terminal_table_fits_80_columns_and_stars_sure_gains() -> None:
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


def test_leaderboard_gets_empty_answers_and_no_unasked_ones(tmp_path: Path) -> None:
    write_lamp_files([record("a", "merged:topic", 1.0, ""), record("b", "merged:topic")], FILMS, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{GOLDS}.json", "merged-topic.json"]
    assert "b-0" not in (tmp_path / "merged-topic.json").read_text("utf-8")
    alike = [replace(record(user, "merged", 1.0, "ahoy"), query_id="0") for user in "ab"]
    write_lamp_files(alike, FILMS, tmp_path)
    assert [gold["id"] for gold in json.loads((tmp_path / "merged.json").read_text("utf-8"))["golds"]] == ["a-0", "b-0"]


def row(method: str, loss: float, tokens: float = 90.0) -> MethodRow:
    return MethodRow(method, 9, loss, {}, {}, 0.0, tokens, None, 800.0)


def test_base_model_does_not_stretch_the_scale_of_losses() -> None:
    rows = [row("base", 9.0), row("common", 3.6), row("common+history@h1", 3.4, 270), row("merged", 3.5)]
    panels = prices_figure(rows).axes
    assert all(panel.get_ylim()[0] < 3.4 and 3.6 < panel.get_ylim()[1] < 4 for panel in panels)
    assert [text.get_text() for text in panels[1].texts] == ["9.00 ↑"]
    legend = [text.get_text() for text in panels[1].get_legend().get_texts()]
    assert legend == ["base", "common", "merged", "past items in the prompt: 0", "past items in the prompt: 1"]
    assert not list(prices_figure([row("base+history@h1", 8.0), row("base", 9.0)]).axes[0].texts)


VOICES = {
    "ann": "ahoy matey, {} be the finest thing on the seven seas, arrr",
    "bob": "Dear Sir or Madam, I beg to remark that {} is most agreeable.",
    "cat": "omg {} lol!!! soooo good u guys <3",
    "dan": "{}: confirmed. Proceed. Over and out.",
}
TOPICS = ("tea", "rain", "chess", "bread", "mountains", "jazz")
SELF = {name: name for name in VOICES}
NEXT = dict(zip(VOICES, [*list(VOICES)[1:], "ann"], strict=True))
ALIKE = dict.fromkeys(VOICES, "ann")


def person(name: str, voice: str) -> History:
    items = tuple(Item(f"{name}-{t}", {"input": f"What of {t}?", "output": voice.format(t)}) for t in TOPICS[:4])
    return History(name, items, tuple(Query(f"{name}-{t}", f"What of {t}?", voice.format(t)) for t in TOPICS[4:]))


PEOPLE = [person(name, voice) for name, voice in VOICES.items()]


def written(method: str, voice_of: dict[str, str]) -> list[Record]:
    """Two texts of each person, in the voice of somebody."""
    said = {name: [VOICES[voice].format(of) for of in ("oil", "soup")] for name, voice in voice_of.items()}
    return [record(name, method, written=texts) for name, texts in said.items()]


@pytest.mark.parametrize("judge", ["n-grams", "Delta"])
def test_each_judge_knows_people_by_texts_that_sound_like_them(judge: str) -> None:
    texts = [*written("own", SELF), *written("mixed up", NEXT), *written("base", ALIKE)]
    rows = authorship(PEOPLE, [*texts, *written("unfinished", SELF)[:-1]], CHAT)
    found = {row.method: row for row in rows if row.judge == judge}
    assert set(found) == {GOLD, "own", "mixed up", "base"}
    for known in (GOLD, "own"):
        assert (found[known].named.mean, found[known].rank.mean) == (1.0, 1.0)
    assert found["mixed up"].named.mean == 0.0
    assert found["mixed up"].rank.mean > 1.5
    assert found["base"].named.mean == 1 / len(VOICES)
    assert found[GOLD].against == {}
    own, base = found["own"].against, found["base"].against
    assert (own.keys(), own["base"].mean, base["own"].mean) == ({"mixed up", "base"}, 0.75, -0.75)
    assert not own["base"].significant  # four people are too few
    table = authorship_table(list(found.values()))
    assert f"4 people, judged by {judge}; chance level 25.0%" in table
    assert "| own | 100.0% (100.0% to 100.0%) | 1.00 (1.00 to 1.00) |" in table
    assert "| +75.0% (" in table
    with pytest.raises(BankError, match="too little text to distinguish their 4 people"):
        authorship([replace(person, items=()) for person in PEOPLE], [], CHAT)
