"""Tasks, items and histories: LaMP's own words, every accepted shape, and refusals with person and field at fault."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bank.errors import BankError, ProfileError
from bank.items.histories import Query, read_excluded, read_histories
from bank.items.lessons import lesson_key
from bank.items.profile import item_pair, item_text, own_texts, parse_item, profile_embedding, text_pair, untaught
from bank.items.tasks import Task, get_task, tasks

HEADLINE, RATING, CHAT = (get_task(name) for name in ("news_headline", "movie_rating", "chat"))


def test_tasks_cover_lamp_and_chat_with_the_turns_of_lamp() -> None:
    lamp = {task.lamp for task in tasks().values()}
    assert lamp == {"LaMP-1", "LaMP-2", "LaMP-2N", "LaMP-3", "LaMP-4", "LaMP-5", "LaMP-7", None}
    assert {"movie_rating", "product_rating", "chat"} <= set(tasks())
    with pytest.raises(BankError, match=r"unknown task 'headlines'.*news_headline"):
        get_task("headlines")
    score = "What is the score of the following {0} on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without "
    score += "further explanation. {0}: T"
    turns = {"product_rating": score.format("review"), "movie_rating": score.format("movie")}
    turns["news_headline"] = "Generate a headline for the following article: T"
    turns["scholarly_title"] = "Generate a title for the following abstract of a paper: T"
    for name, turn in turns.items():
        task = get_task(name)
        assert task.input.format_map(dict.fromkeys(task.fields, "T")) == turn


@pytest.mark.parametrize("task", tasks().values(), ids=tasks())
def test_every_task_embeds_pair_fields_and_quotes_known_fields(task: Task) -> None:
    assert set(task.text) & set(task.pair_fields)
    assert task.memory_fields
    assert set(task.memory_fields) <= set(task.fields)
    assert "{memories}" in task.remembering and "{input}" in task.remembering


def test_lamp_item_gives_pair_and_text_without_unknown_fields() -> None:
    item = parse_item({"id": "7", "title": "Big News", "text": "It happened.", "date": "2020-01-01"}, HEADLINE, 0)
    assert (item.id, set(item.fields)) == ("7", {"title", "text"})
    assert item_pair(item, HEADLINE) == ("Generate a headline for the following article: It happened.", "Big News")
    assert item_text(item, HEADLINE) == "Big News\nIt happened."
    braces = parse_item({"title": "{title} {0} {", "text": "{text}"}, HEADLINE, 0)  # are text
    assert item_pair(braces, HEADLINE) == ("Generate a headline for the following article: {text}", "{title} {0} {")
    abstract = parse_item({"title": "On Tides", "abstract": "They rise."}, get_task("scholarly_title"), 0)
    assert set(item_text(abstract, CHAT).split("\n")) == {"On Tides", "They rise."}  # of another task: all it has


def test_numbers_become_texts_and_ids_with_all_their_digits() -> None:
    """As an id, `time.time()` tells items apart."""
    number, text = (parse_item({"text": "Dogma (1999)", "score": score}, RATING, 0) for score in (5, "5"))
    assert item_pair(number, RATING) == item_pair(text, RATING)
    ids = [parse_item({"id": number, "text": "a"}, CHAT, 0).id for number in (1700000000.123, 1700000999.9, 5.0, 5)]
    assert ids == ["1700000000.123", "1700000999.9", "5", "5"]


def test_a_pair_serves_every_task_and_a_short_text_none() -> None:
    pair = "Generate a headline for the following article: It happened.", "Big News"
    item = parse_item(dict(zip(("input", "output"), pair, strict=True)), HEADLINE, 0)
    assert item_pair(item, HEADLINE) == pair
    assert item_text(item, HEADLINE) == "It happened.\nBig News"
    for task in (HEADLINE, RATING, CHAT):
        item = parse_item({"text": "I like trains."}, task, 0)
        assert item_text(item, task) == "I like trains."
        assert item_pair(item, task) is None
    assert item_pair(parse_item({"text": "a", "input": "b"}, CHAT, 0), CHAT) is None
    first = parse_item({"text": "a", "title": "b", "noise": 1}, HEADLINE, 0)
    again = parse_item({"title": "b", "text": "a"}, HEADLINE, 5)
    other = parse_item({"title": "b", "text": "A"}, HEADLINE, 0)
    assert first.id == again.id != other.id


BEGUN = "Write the next sentences of the text that begins: "
LONG = "I went to the sea this morning, as ever. " + "The waves were high. " * 20
UNSPACED = "海" * 30 + "。" + "今天也去了海边。" * 60


@pytest.mark.parametrize(
    ("text", "turn", "output"),
    [
        ("I like trains.", "Write a text.", "I like trains."),
        (f" {LONG[:398]} ", "Write a text.", LONG[:398].strip()),
        (LONG, f"{BEGUN}{LONG[:61].strip()}", LONG[61:].strip()),
        ("Hello there\n\n" + LONG, f"{BEGUN}Hello there\n\n{LONG[:40].strip()}", LONG[40:].strip()),
        ("word " * 100, f"{BEGUN}{('word ' * 48).strip()}", ("word " * 52).strip()),
        ("x" * 500, f"{BEGUN}{'x' * 240}", "x" * 260),
        (UNSPACED, f"{BEGUN}{UNSPACED[:47]}", UNSPACED[47:]),
        ("🌊" * 400, f"{BEGUN}{'🌊' * 240}", "🌊" * 160),
    ],
)
def test_a_plain_text_becomes_a_lesson(text: str, turn: str, output: str) -> None:
    item = parse_item({"text": text}, CHAT, 0)
    assert text_pair(text, CHAT) == (turn, output)
    assert item_pair(item, CHAT) == (None if turn == "Write a text." else (turn, output))
    assert item_text(item, CHAT) == text
    assert own_texts([item], CHAT) == [text]


@pytest.mark.parametrize("text", ["I like trains.", LONG, UNSPACED])
def test_a_plain_text_is_one_lesson_with_itself_as_an_answer(text: str) -> None:
    pair = text_pair(text, CHAT)
    assert pair is not None
    assert lesson_key(CHAT, *pair) == lesson_key(CHAT, "as the app asks", text) != lesson_key(CHAT, pair[0], "other")


@pytest.mark.parametrize("task", [HEADLINE, RATING, CHAT])
def test_a_text_that_teaches_nothing_says_why(task: Task) -> None:
    text = "Yes." if task is CHAT else LONG
    assert item_pair(parse_item({"text": text}, task, 0), task) is None
    told = "'Yes.' is too short to learn from" if task is CHAT else f"the bank's task, {task.name}, learns from no text"
    assert untaught(text, task).startswith(told)


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        *(("text", "items.3"), (None, "items.3"), ({}, "items.3.text"), ({"score": "5"}, "items.3.text")),
        *(({"text": text}, "items.3.text") for text in (" \n\t", 1 + 1j, True, float("nan"), "a\0b", "a\ud800b")),
        *(({"text": "a", "title": {"b": 1}}, "items.3.title"), ({"input": "a"}, "items.3.output")),
        *(({"output": "a"}, "items.3.input"), *(({"text": "a", "id": bad}, "items.3.id") for bad in ("", "x" * 257))),
    ],
)
def test_an_item_that_cannot_stand_is_refused_by_field(raw: object, param: str) -> None:
    with pytest.raises(ProfileError) as caught:
        parse_item(raw, RATING if raw == {"score": "5"} else HEADLINE, 3)
    assert caught.value.param == param
    assert param in str(caught.value)


scalars = st.none() | st.booleans() | st.floats() | st.text()


@given(st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(st.text(), x), max_leaves=10))
def test_any_json_parses_to_an_item_or_a_profile_error(raw: object) -> None:
    try:
        item = parse_item(raw, HEADLINE, 0)
    except ProfileError:
        return
    assert item_text(item, HEADLINE).strip()


def test_profile_is_normalised_mean_or_zeros_if_items_cancel() -> None:
    for vectors, mean in (([[1, 0, 0], [0, 1, 0]], [2**-0.5, 2**-0.5, 0]), ([[1, 0], [-1, 0]], [0, 0])):
        embedding = profile_embedding(np.array(vectors, dtype=np.float32))
        np.testing.assert_allclose(embedding, mean, rtol=1e-6)
        assert embedding.dtype == np.float32
    with pytest.raises(ProfileError, match="at least one item"):
        profile_embedding(np.zeros((0, 4), dtype=np.float32))


def write(path: Path, document: object) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


ASKED = {"id": "q", "input": "Later?", "gold": "Secret"}


def person(user_id: str, *titles: str) -> dict[str, object]:
    return {"user_id": user_id, "profile": [{"id": t, "title": t, "text": f"about {t}"} for t in titles], "query": []}


def test_user_layout_is_read_in_order_without_duplicates(tmp_path: Path) -> None:
    asked = {**person("bob", "Three"), "query": [ASKED]}
    path = write(tmp_path / "users.json", [person("ann", "One", "Two", "One"), asked])
    ann, bob = read_histories(path, HEADLINE)
    assert (ann.user_id, bob.user_id) == ("ann", "bob")
    turn = "Generate a headline for the following article: about"
    assert ann.pairs(HEADLINE) == [(f"{turn} One", "One"), (f"{turn} Two", "Two")]
    assert [output for _, output in bob.pairs(HEADLINE)] == ["Three"]
    assert bob.queries == ()
    asked["query"] += [{"id": 2, "input": "Which?", "gold": 4.0}]
    (again,) = read_histories(write(path, [asked]), HEADLINE, queries=True)
    assert again.queries == (Query("q", "Later?", "Secret"), Query("2", "Which?", "4"))


def test_lamp_questions_join_the_profile_if_all_are_answered(tmp_path: Path) -> None:
    profile = [{"id": "1", "title": "One", "text": "about One"}]
    questions = [{"id": n, "user_id": "ann", "input": f"Q{n}", "profile": profile} for n in ("11", "12")]
    questions.append({"id": "13", "input": "What now?", "profile": profile})
    golds = {"task": "LaMP_4", "golds": [{"id": n, "output": f"to {n}"} for n in ("11", "12", "13")]}
    people = read_histories(write(tmp_path / "q.json", questions), HEADLINE, write(tmp_path / "o.json", golds))
    outputs = {one.user_id: [output for _, output in one.pairs(HEADLINE)] for one in people}
    assert outputs == {"ann": ["One", "to 11", "to 12"], "13": ["One", "to 13"]}
    assert people[1].pairs(HEADLINE)[-1] == ("What now?", "to 13")
    file = write(tmp_path / "q.json", [{"id": "11", "input": "What now?", "profile": [{"text": "a"}]}])
    missing, other = {"golds": [{"id": "11"}]}, {"golds": [{"id": "12", "output": "x"}]}
    reasons = ("must hold", "golds.0.output: Field required", "question '11' has no gold")
    for golds, message in zip(([], missing, other), reasons, strict=True):
        with pytest.raises(BankError, match=message):
            read_histories(file, HEADLINE, write(tmp_path / "o.json", golds))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ({"user_id": "ann"}, "must hold a list of people"),
        ([], "lists no people"),
        (["ann"], "a list of people.*; 0: .*got 'ann'"),
        ([{"profile": []}], "0.user_id: Field required"),
        ([{"user_id": True, "profile": []}], "0.user_id: .*got True"),
        ([{"user_id": "\ud83d", "profile": []}], "0.user_id: .*a lone surrogate"),
        ([{"user_id": "ann"}], "0.profile: Field required"),
        ([{"user_id": "ann", "profile": []}], "person 'ann' has an empty profile"),
        ([person("ann", "One"), person("ann", "Two")], "person 'ann' appears twice"),
        ([{"user_id": "bob", "profile": [{"text": "a"}, {"text": "b"}, {}]}], r"person 'bob': items\.2\.text"),
        ([{"user_id": "bob", "profile": [{"text": "a", "title": ["b"]}]}], r"person 'bob': items\.0\.title"),
        ([person("ann", "One")], "person 'ann' has no queries to evaluate on"),
        ([person("ann", "One") | {"query": None}], "person 'ann' has no queries to evaluate on"),
        ([person("ann", "One") | {"query": [{"id": "q", "input": "?"}]}], "`query` must .*; 0.gold: Field required"),
        ([person("ann", "One") | {"query": [ASKED | {"gold": "\ud83d"}]}], "`query` .*; 0.gold: .*a lone surrogate"),
        ([person("ann", "One") | {"query": [ASKED, ASKED]}], "person 'ann' has several queries with the id 'q'"),
        ([person("ann", "One") | {"query": "Later?"}], "person 'ann': its `query` must hold .*got 'Later"),
    ],
)
def test_a_malformed_file_is_refused_by_person_and_item(tmp_path: Path, document: object, message: str) -> None:
    with pytest.raises(BankError, match=message):
        read_histories(write(tmp_path / "users.json", document), HEADLINE, queries="quer" in message)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BankError, match=r"cannot read .*nobody\.json"):
        read_histories(tmp_path / "nobody.json", HEADLINE)


def test_excluded_people_are_read_as_ids_or_as_people(tmp_path: Path) -> None:
    for document in (["ann", 7], [{"user_id": "ann"}, {"id": 7}], [person("ann", "One"), "7"]):
        assert read_excluded(write(tmp_path / "out.json", document)) == {"ann", "7"}
    for nobody in ([None], [{"name": "ann"}], {"ann": 1}, [["ann"]]):
        with pytest.raises(BankError, match="must hold a list of ids, or of people"):
            read_excluded(write(tmp_path / "out.json", nobody))


def test_last_items_become_queries_and_earlier_ones_the_profile(tmp_path: Path) -> None:
    (ann,) = read_histories(write(tmp_path / "users.json", [person("ann", *"abcde")]), HEADLINE)
    found = ann.with_queries(HEADLINE, 2, 1)
    assert [item.id for item in found.items] == ["c"]
    turn = "Generate a headline for the following article: about"
    assert found.queries == (Query("ann-0", f"{turn} d", "d"), Query("ann-1", f"{turn} e", "e"))
    assert ann.with_queries(HEADLINE, 2).items == ann.items[:3]
