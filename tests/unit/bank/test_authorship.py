"""Whose voice a text has: people themselves, a method that copies them, and one that says the same for everybody."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bank.errors import BankError
from bank.evaluation.authorship import GOLD, AuthorshipRow, authorship, markdown
from bank.evaluation.run import Record
from bank.items.histories import History, Query
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


def person(name: str, voice: str) -> History:
    items = tuple(Item(f"{name}-{t}", {"input": f"What of {t}?", "output": voice.format(t)}) for t in TOPICS[:4])
    return History(name, items, tuple(Query(f"{name}-{t}", f"What of {t}?", voice.format(t)) for t in TOPICS[4:]))


PEOPLE = [person(name, voice) for name, voice in VOICES.items()]


def records(method: str, voice_of: dict[str, str]) -> list[Record]:
    """Two texts of each person, in the voice of somebody."""
    return [
        Record("key", name, "q", method, 0, 1.0, None, "", written=[VOICES[voice].format(of) for of in ("oil", "soup")])
        for name, voice in voice_of.items()
    ]


def rows(*found: list[Record]) -> dict[str, AuthorshipRow]:
    return {row.method: row for row in authorship(PEOPLE, [record for each in found for record in each], CHAT)}


SELF = {name: name for name in VOICES}
NEXT = dict(zip(VOICES, [*list(VOICES)[1:], "ann"], strict=True))


def test_people_are_known_by_their_own_later_texts_and_by_those_that_sound_like_them() -> None:
    written = (records("own", SELF), records("mixed up", NEXT), records("base", dict.fromkeys(VOICES, "ann")))
    found = rows(*written, records("unfinished", SELF)[:-1])
    assert set(found) == {GOLD, "own", "mixed up", "base"}
    assert (found[GOLD].named.mean, found[GOLD].rank.mean) == (1.0, 1.0)
    assert (found["own"].named.mean, found["own"].rank.mean) == (1.0, 1.0)
    assert found["mixed up"].named.mean == 0.0
    assert found["mixed up"].rank.mean > 1.5
    assert found["base"].named.mean == 1 / len(VOICES)


def test_methods_are_compared_over_the_same_people_and_the_table_says_what_chance_is() -> None:
    found = rows(records("own", SELF), records("base", dict.fromkeys(VOICES, "ann")))
    assert found[GOLD].against == {}
    own, base = found["own"].against, found["base"].against
    assert (own.keys(), own["base"].mean, base["own"].mean) == ({"base"}, 0.75, -0.75)
    assert not own["base"].significant  # four people are too few
    table = markdown(list(found.values()))
    assert "4 people; chance level 25.0%" in table
    assert "| own | 100.0% (100.0% to 100.0%) | 1.00 (1.00 to 1.00) |" in table
    assert "| +75.0% (" in table


def test_many_people_make_a_difference_sure() -> None:
    everybody = [person(f"{name}{n}", VOICES[name] + f" {n * 7919}" * 3) for n in range(3) for name in VOICES]
    written = [
        Record("key", someone.user_id, "q", method, 0, 1.0, None, "", written=[query.gold for query in sounds.queries])
        for someone in everybody
        for method, sounds in (("own", someone), ("base", everybody[0]))
    ]
    found = {row.method: row for row in authorship(everybody, written, CHAT)}
    assert found["own"].against["base"].significant
    assert f"| **{found['own'].against['base'].mean:+.1%} (" in markdown(list(found.values()))


def test_profiles_without_anything_in_common_are_refused() -> None:
    silent = [replace(person, items=()) for person in PEOPLE]
    with pytest.raises(BankError, match="too little text to distinguish their 4 people"):
        authorship(silent, [], CHAT)
