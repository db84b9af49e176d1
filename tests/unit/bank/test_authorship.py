"""Whose voice a text has: people themselves, a method that copies them, and one that says the same for everybody."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bank.errors import BankError
from bank.evaluation.people import Person, Query
from bank.evaluation.records import Record
from bank.evaluation.report.authorship import GOLD, AuthorshipRow, authorship, markdown
from bank.items.histories import History
from bank.items.profile import Item
from bank.items.tasks import get_task

CHAT = get_task("chat")
VOICES = {
    "ann": "ahoy matey, {} be the finest thing on the seven seas, arrr",
    "bob": "Dear Sir or Madam, I beg to remark that {} is most agreeable.",
    "cat": "omg {} lol!!! soooo good u guys <3",
    "dan": "{}: confirmed. Proceed. Over and out.",
}
TOPICS = ("tea", "rain", "chess", "bread", "mountains", "jazz")


def person(name: str, voice: str | None = None) -> Person:
    voice = voice or VOICES[name]
    items = tuple(
        Item(f"{name}-{topic}", {"input": f"What of {topic}?", "output": voice.format(topic)}) for topic in TOPICS[:4]
    )
    queries = tuple(Query(f"{name}-{t}", f"What of {t}?", voice.format(t)) for t in TOPICS[4:])
    return Person(History(name, items), queries)


PEOPLE = [person(name) for name in VOICES]


def records(method: str, voice_of: dict[str, str]) -> list[Record]:
    """Two texts of each person, in the voice of somebody."""
    made = []
    for someone in PEOPLE:
        texts = [VOICES[voice_of[someone.user_id]].format(topic) for topic in ("trains", "soup")]
        made.append(Record("key", someone.user_id, "q", method, 0, 1.0, None, "", written=texts))
    return made


def copied(someone: Person, other: Person, method: str) -> Record:
    """What a method writes that makes someone sound like the other."""
    texts = [query.gold for query in other.queries]
    return Record("key", someone.user_id, "q", method, 0, 1.0, None, "", written=texts)


def rows(*found: list[Record]) -> dict[str, AuthorshipRow]:
    return {row.method: row for row in authorship(PEOPLE, [record for each in found for record in each], CHAT)}


SELF = {name: name for name in VOICES}
NEXT = dict(zip(VOICES, [*list(VOICES)[1:], "ann"], strict=True))


def test_people_are_known_by_their_own_later_texts_and_by_those_that_sound_like_them() -> None:
    found = rows(records("own", SELF), records("mixed up", NEXT), records("base", dict.fromkeys(VOICES, "ann")))
    assert (found[GOLD].named.mean, found[GOLD].rank.mean) == (1.0, 1.0)
    assert (found["own"].named.mean, found["own"].rank.mean) == (1.0, 1.0)
    assert found["mixed up"].named.mean == 0.0
    assert found["mixed up"].rank.mean > 1.5
    assert found["base"].named.mean == 1 / len(VOICES)


def test_a_method_that_did_not_write_for_everybody_has_no_row() -> None:
    assert set(rows(records("own", SELF)[:-1])) == {GOLD}


def test_the_table_says_what_chance_is() -> None:
    table = markdown(authorship(PEOPLE, records("own", SELF), CHAT))
    assert "4 people; chance names 25.0%" in table
    assert "| own | 100.0% (100.0% to 100.0%) | 1.00 (1.00 to 1.00) |" in table


def test_methods_are_compared_over_the_same_people() -> None:
    written = [*records("own", SELF), *records("base", dict.fromkeys(VOICES, "ann"))]
    found = {row.method: row.against for row in authorship(PEOPLE, written, CHAT)}
    assert found[GOLD] == {}
    assert found["own"].keys() == {"base"}
    assert (found["own"]["base"].mean, found["base"]["own"].mean) == (0.75, -0.75)
    assert not found["own"]["base"].sure  # four people are too few
    assert "| +75.0% (" in markdown(authorship(PEOPLE, written, CHAT))


def test_many_people_make_a_difference_sure() -> None:
    everybody = [person(f"{name}{n}", VOICES[name] + f" {n * 7919}" * 3) for n in range(3) for name in VOICES]
    written = [text for one in everybody for text in (copied(one, one, "own"), copied(one, everybody[0], "base"))]
    found = {row.method: row for row in authorship(everybody, written, CHAT)}
    assert found["own"].against["base"].sure
    assert f"| **{found['own'].against['base'].mean:+.1%} (" in markdown(list(found.values()))


def test_profiles_without_anything_in_common_are_refused() -> None:
    silent = [replace(p, history=History(p.user_id, p.history.items[:0])) for p in PEOPLE]
    with pytest.raises(BankError, match="too little text to tell their 4 people apart"):
        authorship(silent, [], CHAT)
