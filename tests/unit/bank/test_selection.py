"""Anchors: people unlike each other, with long histories, exactly as many as asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bank.building.selection import (
    SERVED_ITEMS,
    held_out_people,
    person_embedding,
    sampled_embedding,
    select_anchors,
    spread,
    typical_words,
)
from bank.items.histories import History
from bank.items.profile import Item, Vectors, parse_item, profile_embedding
from bank.items.tasks import get_task
from server.settings import Settings


def groups(*sizes: int) -> Vectors:
    """Tight groups of people far apart from each other."""
    rows = np.repeat(np.eye(len(sizes), dtype=np.float32), sizes, axis=0)
    return rows + np.random.default_rng(0).normal(scale=0.01, size=rows.shape).astype(np.float32)


def test_each_cluster_gives_its_longest_history_and_the_first_of_equal_ones() -> None:
    lengths = [11, 30, 12, 50, 13, 14, 99, 15]
    assert select_anchors(groups(3, 2, 3), lengths, 3, seed=0) == [1, 3, 6]
    assert select_anchors(groups(3, 3), [20] * 6, 2, seed=0) == [0, 3]
    assert select_anchors(None, [11, 30, 12, 50, 12, 14], 3, seed=0) == [1, 3, 5]  # whatever they are about
    # K-means finds one cluster in five equal points: the empty ones go to the longest histories left.
    assert select_anchors(np.ones((5, 4), dtype=np.float32), [11, 15, 12, 14, 13], 3, seed=0) == [1, 3, 4]


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 3), st.booleans())
def test_there_are_exactly_as_many_as_asked_for(count: int, more: int, seed: int, alike: bool) -> None:
    people = count + more
    embeddings = np.random.default_rng(seed).normal(size=(people, 4)).astype(np.float32)
    if alike:
        embeddings[:] = embeddings[0]
    chosen = select_anchors(embeddings, list(range(11, 11 + people)), count, seed)
    assert len(chosen) == len(set(chosen)) == count
    assert chosen == sorted(chosen) == select_anchors(embeddings, list(range(11, 11 + people)), count, seed)


def test_embedded_items_are_spread_over_the_whole_history() -> None:
    items = [Item(str(i), {}) for i in range(1_000)]
    chosen = [int(item.id) for item in spread(items, 64)]
    assert len(set(chosen)) == 64
    assert (chosen[0], chosen[-1]) == (0, 999)
    assert max(np.diff(chosen)) - min(np.diff(chosen)) <= 1
    assert spread(items[:10], 64) == items[:10]


class Numbers:
    """Embeds a number as a point on a circle."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def embed(self, texts: list[str]) -> Vectors:
        self.seen += texts
        angles = np.array([int(text) for text in texts]) / 600
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def history(items: int) -> History:
    return History("somebody", tuple(Item(str(i), {"text": str(i)}) for i in range(items)))


def test_an_anchor_is_embedded_like_the_profile_that_a_gateway_keeps_of_them() -> None:
    assert Settings.model_fields["profile_items"].default == SERVED_ITEMS
    embedder = Numbers()
    embedding = person_embedding(history(600), get_task("chat"), embedder)  # type: ignore[arg-type]
    kept = [str(i) for i in range(600 - SERVED_ITEMS, 600)]
    assert embedder.seen == kept
    np.testing.assert_array_equal(embedding, profile_embedding(Numbers().embed(kept)))


def test_candidates_are_told_apart_by_a_sample_and_whoever_is_within_it_by_all() -> None:
    task, embedder = get_task("chat"), Numbers()
    sampled_embedding(history(600), task, embedder)  # type: ignore[arg-type]
    assert len(embedder.seen) == 64
    short = history(64)
    np.testing.assert_array_equal(
        sampled_embedding(short, task, Numbers()),  # type: ignore[arg-type]
        person_embedding(short, task, Numbers()),  # type: ignore[arg-type]
    )


def crowd(*lengths: int) -> list[History]:
    return [
        History(f"p{place}", tuple(Item(f"{n}", {"input": "i", "output": f"{n}"}) for n in range(length)))
        for place, length in enumerate(lengths)
    ]


@pytest.mark.parametrize(
    ("lengths", "needed", "found"),
    [
        ([*range(1, 31)], 5, [9, 10, 11, 12, 13, 14, 15]),
        ([20] * 120, 5, [20] * 16),
        ([20] * 23, 2, []),
        ([20] * 24, 18, [20] * 6),
        ([20] * 24, 19, []),
        ([9] * 6 + [20] * 18, 18, [9] * 6),
        ([8] * 60, 0, []),
    ],
)
def test_those_with_the_shortest_long_enough_histories_are_left_out_unless_anchors_or_figure_would_suffer(
    lengths: list[int], needed: int, found: list[int]
) -> None:
    assert [len(person.items) for person in held_out_people(crowd(*lengths), get_task("chat"), needed)] == found


def test_who_has_items_of_plain_text_stays() -> None:
    people = crowd(*[9] * 24)
    plain = [History(person.user_id, (*person.items, Item("text", {"text": "hi"}))) for person in people]
    assert len(held_out_people(people, get_task("chat"), 0)) == 6
    assert held_out_people(plain, get_task("chat"), 0) == []


def test_who_answers_what_the_task_lacks_stays() -> None:
    """Nobody's histogram has a share for it."""

    def raters(*lasts: str) -> list[History]:
        return [
            History(f"p{n}", tuple(Item(f"{i}", {"text": "t", "score": s}) for i, s in enumerate(["1"] * 8 + [last])))
            for n, last in enumerate(lasts)
        ]

    for last in ("5", "4.5"):
        assert len(held_out_people(raters(*["5"] * 23, last), get_task("movie_rating"), 0)) == 6
    assert held_out_people(raters(*["4.5"] * 24), get_task("movie_rating"), 0) == []


CHAT = get_task("chat")


def writer(name: str, *texts: str) -> History:
    return History(name, tuple(parse_item({"text": text}, CHAT, place) for place, text in enumerate(texts)))


def test_an_anchor_is_told_by_words_that_it_used_more_than_once_and_others_did_not() -> None:
    gardener = writer(
        "g", "the roses are open", "prune the roses today", "roses and Miller's plums", "plums again today"
    )
    sailor = writer("s", "the swell came today", "a swell at dawn", "waxed boards for the swell", "boards at dawn")
    assert typical_words([gardener, sailor], CHAT, count=2) == [("roses", "plums"), ("swell", "boards")]
    assert all("miller" not in words for words in typical_words([gardener, sailor], CHAT))
    people = [writer("a", "it is 555123", "it is 555123"), writer("b", "and so", "and so")]
    assert typical_words(people, CHAT) == [(), ()]
