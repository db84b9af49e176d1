"""Histories from files: both layouts, people left out, and errors that name person and item."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bank.errors import BankError
from bank.items.histories import Query, read_excluded, read_histories
from bank.items.tasks import get_task

HEADLINE = get_task("news_headline")


def write(path: Path, document: object) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


def person(user_id: str, *titles: str) -> dict[str, object]:
    return {"user_id": user_id, "profile": [{"id": t, "title": t, "text": f"about {t}"} for t in titles], "query": []}


def test_the_per_user_layout_is_read_in_order_each_item_once_and_no_query(tmp_path: Path) -> None:
    asked = {**person("bob", "Three"), "query": [{"id": "q", "input": "Later?", "gold": "Secret"}]}
    path = write(tmp_path / "users.json", [person("ann", "One", "Two", "One"), asked])
    ann, bob = read_histories(path, HEADLINE)
    assert (ann.user_id, bob.user_id) == ("ann", "bob")
    assert ann.pairs(HEADLINE) == [
        ("Generate a headline for the following article: about One", "One"),
        ("Generate a headline for the following article: about Two", "Two"),
    ]
    assert [output for _, output in bob.pairs(HEADLINE)] == ["Three"]
    assert bob.queries == ()
    (again,) = read_histories(write(path, [asked]), HEADLINE, queries=True)
    assert again.queries == (Query("q", "Later?", "Secret"),)


def test_lamps_own_questions_and_outputs_add_the_answered_questions_to_their_persons_profile(tmp_path: Path) -> None:
    profile = [{"id": "1", "title": "One", "text": "about One"}]
    questions = [{"id": n, "user_id": "ann", "input": f"Q{n}", "profile": profile} for n in ("11", "12")]
    questions.append({"id": "13", "input": "What now?", "profile": profile})
    golds = {"task": "LaMP_4", "golds": [{"id": n, "output": f"to {n}"} for n in ("11", "12", "13")]}
    people = read_histories(write(tmp_path / "q.json", questions), HEADLINE, write(tmp_path / "o.json", golds))
    assert {one.user_id: [output for _, output in one.pairs(HEADLINE)] for one in people} == {
        "ann": ["One", "to 11", "to 12"],
        "13": ["One", "to 13"],
    }
    assert people[1].pairs(HEADLINE)[-1] == ("What now?", "to 13")


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "is not JSON"),
        ({"user_id": "ann"}, "must hold a list of people"),
        ([], "lists no people"),
        (["ann"], "a list of people.*; 0: .*got 'ann'"),
        ([{"profile": []}], "0.user_id: Field required"),
        ([{"user_id": True, "profile": []}], "0.user_id: .*got True"),
        ([{"user_id": "ann"}], "0.profile: Field required"),
        ([{"user_id": "ann", "profile": []}], "person 'ann' has an empty profile"),
        ([person("ann", "One"), person("ann", "Two")], "person 'ann' appears twice"),
        (
            [person("ann", "One"), {"user_id": "bob", "profile": [{"text": "a"}, {"text": "b"}, {}]}],
            r"person 'bob': items\.2\.text",
        ),
        ([{"user_id": "bob", "profile": [{"text": "a", "title": ["b"]}]}], r"person 'bob': items\.0\.title"),
    ],
)
def test_a_malformed_file_is_refused_by_person_and_item(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(BankError, match=message):
        read_histories(write(tmp_path / "users.json", document), HEADLINE)
    with pytest.raises(BankError, match=r"cannot read .*nobody\.json"):
        read_histories(tmp_path / "nobody.json", HEADLINE)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ([], "person 'ann' has no queries to evaluate on"),
        (None, "person 'ann' has no queries to evaluate on"),
        ([{"id": "q", "input": "Later?"}], "person 'ann': its `query` must hold .*; 0.gold: Field required"),
        ([{"id": "q", "input": "Later?", "gold": ["No"]}], r"0.gold: .*got \['No'\]"),
        ("Later?", "got 'Later"),
    ],
)
def test_queries_that_cannot_be_evaluated_are_refused(tmp_path: Path, query: object, message: str) -> None:
    path = write(tmp_path / "users.json", [{**person("ann", "One"), "query": query}])
    with pytest.raises(BankError, match=message):
        read_histories(path, HEADLINE, queries=True)


@pytest.mark.parametrize(
    ("golds", "message"),
    [
        ([], "must hold"),
        ({"golds": [{"id": "11"}]}, "golds.0.output: Field required"),
        ({"golds": [{"id": "12", "output": "x"}]}, "question '11' has no gold"),
    ],
)
def test_an_outputs_file_that_does_not_answer_is_refused(tmp_path: Path, golds: object, message: str) -> None:
    questions = [{"id": "11", "input": "What now?", "profile": [{"text": "a"}]}]
    with pytest.raises(BankError, match=message):
        read_histories(write(tmp_path / "q.json", questions), HEADLINE, write(tmp_path / "o.json", golds))


@pytest.mark.parametrize("document", [["ann", 7], [{"user_id": "ann"}, {"id": 7}], [person("ann", "One"), "7"]])
def test_people_to_leave_out_come_as_a_list_of_ids_or_in_the_same_layout(tmp_path: Path, document: object) -> None:
    assert read_excluded(write(tmp_path / "out.json", document)) == {"ann", "7"}


@pytest.mark.parametrize("document", [[None], [{"name": "ann"}], {"ann": 1}, [["ann"]]])
def test_a_list_that_names_nobody_is_refused(tmp_path: Path, document: object) -> None:
    with pytest.raises(BankError, match="must hold a list of ids, or of people"):
        read_excluded(write(tmp_path / "out.json", document))
