"""Notes in place of a draft, and which facts of a draft stand in a text."""

from __future__ import annotations

import time

import pytest

from bank.items.drafts import kept, notes_of
from bank.items.profile import item_pair, parse_item
from bank.items.tasks import get_task

MAIL = "Dear Ann,\nthe meeting with Bob Miller is on Tuesday at 10:30. Write to a.b@x.org or see https://x.org/a?b=1."
TASK = get_task("rewrite")


def test_notes_are_content_words_in_their_order() -> None:
    notes = "Dear, Ann, meeting, Bob, Miller, Tuesday, 10:30, Write, a.b@x.org, see, https://x.org/a?b=1"
    assert notes_of(MAIL) == notes


@pytest.mark.parametrize("text", ["", "and it is so", "ok then", "…!? ---", "🙂 🙂 🙂"])
def test_a_text_without_content_has_no_notes(text: str) -> None:
    assert notes_of(text) == ""


def test_all_facts_of_a_text_stand_in_itself() -> None:
    counts = {"links": "1 of 1", "addresses": "1 of 1", "numbers": "1 of 1", "names": "4 of 4"}
    assert kept(MAIL, MAIL) == (counts, [], [])


@pytest.mark.parametrize(
    ("draft", "answer", "missing", "added"),
    [
        ("We meet Bob on 15 May.", "bob, may 15!", [], []),
        ("It costs 1,200 euros.", "It costs 200 euros.", ["1,200"], ["200"]),
        ("See room 5.", "See room 15.", ["5"], ["15"]),
        ("Yes. No. Never.", "Well. Some.", [], []),
        ("I saw Zoë Müller there", "i saw her there", ["Zoë", "Müller"], []),
        ("no facts at all", "and I saw Karl", [], ["Karl"]),
        ("", "", [], []),
    ],
    ids=["case", "number", "part", "sentences", "accents", "added", "empty"],
)
def test_what_is_missing_and_what_is_added(draft: str, answer: str, missing: list[str], added: list[str]) -> None:
    assert kept(draft, answer)[1:] == (missing, added)


LONG = {"a": "a" * 65536, "words": "A b " * 16384, "numbers": " ".join(map(str, range(9999))), "dots": "1." * 30000}
LONG |= {"at": "a@" * 30000, "links": "http://" * 9000, "addresses": "x@y." * 9000, "names": "A-" * 30000}


@pytest.mark.parametrize("kind", LONG)
def test_long_texts_are_read_in_no_time(kind: str) -> None:
    started_s = time.process_time()
    assert kept(LONG[kind], LONG[kind])[1:] == ([], [])
    assert time.process_time() - started_s < 5


def test_a_text_alone_is_that_of_its_notes() -> None:
    turn, output = item_pair(parse_item({"text": MAIL}, TASK, 0), TASK) or ("", "")
    assert (turn, output) == (TASK.input.format(draft=notes_of(MAIL)), MAIL)


def test_a_draft_that_is_there_is_used() -> None:
    item = parse_item({"draft": "meeting moved", "text": MAIL}, TASK, 0)
    assert item_pair(item, TASK) == (TASK.input.format(draft="meeting moved"), MAIL)


def test_a_text_without_content_is_no_lesson_of_drafts() -> None:
    assert item_pair(parse_item({"text": "and it is so"}, TASK, 0), TASK) is None
