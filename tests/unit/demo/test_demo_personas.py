"""The demo's people: marks that tell manners apart, and three who share nothing with the bank."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from bank.items.profile import item_pair, item_text, parse_item, profile_embedding
from bank.items.tasks import get_task
from bank.lookup.embedder import Embedder
from deploy.demo.manners import GARDENER, MANNERS, NIGHT_OWL, PLANNER, SIGN_OFF, Manner
from deploy.demo.personas import PEOPLE, QUESTIONS, anchors

PLAIN = "Boil the water in London. Add the tea and wait."
MIN_ITEMS = 30
ANCHORS = anchors(seed=0)


def _sentences(text: str) -> set[str]:
    """What is said, whatever the manner: without case, bullets, greeting and sign-off."""
    parts = re.split(r"[.!?]\s|[.!?]?\n", text.lower() + "\n")
    said = {part.strip(" -.!?") for part in parts}
    return said - {"", "dear friend,", SIGN_OFF.lower()}


def _manner_of(user: dict[str, object]) -> Manner:
    return next(manner for manner in MANNERS if str(user["user_id"]).startswith(f"{manner.world}-"))


@pytest.mark.parametrize(
    ("manner", "text", "shows"),
    [
        (NIGHT_OWL, "boil the water. wait.", True),
        (NIGHT_OWL, "boil the water in London.", False),
        (NIGHT_OWL, "42", False),
        (PLANNER, "- Boil the water\n\n- Wait", True),
        (PLANNER, "First:\n- Boil the water", False),
        (PLANNER, "1. Boil the water\n2. Wait", False),
        (PLANNER, "", False),
        (GARDENER, f"Boil the water.\n\n{SIGN_OFF}\n", True),
        (GARDENER, f"{SIGN_OFF}, boil the water.", False),
    ],
)
def test_mark_is_told_mechanically(manner: Manner, text: str, shows: bool) -> None:
    assert manner.shows(text) is shows


@pytest.mark.parametrize("manner", MANNERS, ids=lambda manner: manner.world)
def test_a_manner_bears_its_own_mark_and_no_other(manner: Manner) -> None:
    assert [other for other in MANNERS if other.shows(manner.write(PLAIN))] == [manner]
    assert not manner.shows(PLAIN)


def test_every_item_of_an_anchor_bears_its_mark_and_trains() -> None:
    task = get_task("chat")
    assert ANCHORS == anchors(seed=0) != anchors(seed=4)
    for user in ANCHORS:
        items = [parse_item(raw, task, position) for position, raw in enumerate(user["profile"])]
        pairs = [item_pair(item, task) for item in items]
        assert len(set(pairs)) == len(pairs) >= MIN_ITEMS
        assert None not in pairs
        assert all(_manner_of(user).shows(output) for _, output in pairs)


def test_each_of_the_three_has_a_manner_with_anchors_enough_and_nothing_of_theirs_trained_the_bank() -> None:
    assert {person.manner for person in PEOPLE} == set(MANNERS)
    for manner in MANNERS:
        assert sum(_manner_of(user) is manner for user in ANCHORS) > 2
    items = [item for user in ANCHORS for item in user["profile"]]
    trained = set().union(*(_sentences(item[part]) for item in items for part in ("input", "output")))
    for person in PEOPLE:
        assert all(person.manner.shows(line) for line in person.lines)
        assert not trained & set().union(*map(_sentences, person.lines))
    assert len(set(QUESTIONS)) == len(QUESTIONS) == 5
    assert not {item["input"] for item in items} & set(QUESTIONS)


def test_the_lines_of_each_person_find_anchors_of_their_manner(embedder_folder: Path) -> None:
    embedder, task = Embedder.load(embedder_folder), get_task("chat")

    def embedding(items: list[dict[str, str]]) -> np.ndarray:
        texts = [item_text(parse_item(raw, task, position), task) for position, raw in enumerate(items)]
        return profile_embedding(embedder.embed(texts))

    bank = np.stack([embedding(user["profile"]) for user in ANCHORS])
    for person in PEOPLE:
        similarities = bank @ embedding([{"text": line} for line in person.lines])
        nearest = np.argsort(-similarities)[:2]
        assert [_manner_of(ANCHORS[i]) for i in nearest] == [person.manner] * 2
