"""Typical words of anchors: only on request, and never what one item alone has."""

from __future__ import annotations

from bank.building.describing import typical_words
from bank.items.histories import History
from bank.items.profile import parse_item
from bank.items.tasks import get_task

TASK = get_task("chat")


def history(name: str, *texts: str) -> History:
    return History(name, tuple(parse_item({"text": text}, TASK, place) for place, text in enumerate(texts)))


def test_an_anchor_is_told_by_words_that_it_used_more_than_once_and_others_did_not() -> None:
    gardener = history(
        "g", "the roses are open", "prune the roses today", "roses and Miller's plums", "plums again today"
    )
    sailor = history("s", "the swell came today", "a swell at dawn", "waxed boards for the swell", "boards at dawn")
    assert typical_words([gardener, sailor], TASK, count=2) == [("roses", "plums"), ("swell", "boards")]
    assert all("miller" not in words for words in typical_words([gardener, sailor], TASK))


def test_numbers_and_stop_words_tell_nothing() -> None:
    assert typical_words([history("a", "it is 555123", "it is 555123"), history("b", "and so", "and so")], TASK) == [
        (),
        (),
    ]
