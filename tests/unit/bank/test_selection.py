"""Anchors: people unlike each other, with long histories, exactly as many as asked for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bank.building.options import BuildOptions
from bank.building.resume import inputs_key
from bank.building.selection import (
    SERVED_ITEMS,
    held_out_people,
    person_embedding,
    select_anchors,
    spread,
    typical_words,
)
from bank.items.histories import History
from bank.items.profile import Item, Vectors, parse_item, profile_embedding
from bank.items.tasks import get_task
from bank.manifest import PosteriorRule
from server.settings import Settings

CHAT = get_task("chat")


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


class Circle:
    def embed(self, texts: list[str]) -> Vectors:
        angles = np.array([int(text) for text in texts]) / 600
        return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_an_anchor_is_embedded_like_the_profile_that_a_gateway_keeps_of_them() -> None:
    assert Settings.model_fields["profile_items"].default == SERVED_ITEMS
    whole = History("somebody", tuple(Item(str(i), {"text": str(i)}) for i in range(600)))
    kept = Circle().embed([str(i) for i in range(600 - SERVED_ITEMS, 600)])
    found = person_embedding(whole, CHAT, Circle())  # type: ignore[arg-type]
    np.testing.assert_array_equal(found, profile_embedding(kept))


def crowd(*lengths: int) -> list[History]:
    items = [Item(f"{n}", {"input": "i", "output": f"{n}"}) for n in range(max(lengths))]
    return [History(f"p{place}", tuple(items[:length])) for place, length in enumerate(lengths)]


@pytest.mark.parametrize(
    ("lengths", "needed", "found"),
    [
        *(([*range(1, 31)], 5, [9, 10, 11, 12, 13, 14, 15]), ([20] * 120, 5, [20] * 16), ([8] * 60, 0, [])),
        *(([20] * 23, 2, []), ([20] * 24, 18, [20] * 6), ([20] * 24, 19, []), ([9] * 6 + [20] * 18, 18, [9] * 6)),
    ],
)
def test_the_shortest_sufficient_histories_are_held_out(lengths: list[int], needed: int, found: list[int]) -> None:
    assert [len(person.items) for person in held_out_people(crowd(*lengths), CHAT, needed)] == found


def test_who_has_items_of_plain_text_or_answers_what_the_task_lacks_stays() -> None:
    people = crowd(*[9] * 24)
    plain = [History(person.user_id, (*person.items, Item("text", {"text": "hi"}))) for person in people]
    assert (len(held_out_people(people, CHAT, 0)), held_out_people(plain, CHAT, 0)) == (6, [])

    def raters(*lasts: str) -> list[History]:
        scores = [[*["1"] * 8, last] for last in lasts]
        return [
            History(f"p{n}", tuple(Item(f"{i}", {"text": "t", "score": s}) for i, s in enumerate(own)))
            for n, own in enumerate(scores)
        ]

    films = get_task("movie_rating")
    for last in ("5", "4.5"):  # nobody's histogram has a share for the second
        assert len(held_out_people(raters(*["5"] * 23, last), films, 0)) == 6
    assert held_out_people(raters(*["4.5"] * 24), films, 0) == []


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


def test_a_key_tells_apart_what_would_be_another_bank() -> None:
    def key(aside: int = 9, model: str = "model", **changes: object) -> str:
        options = BuildOptions("chat", **changes)  # type: ignore[arg-type]
        return inputs_key(options, CHAT, [crowd(20)[0]], [crowd(aside)[0]], (model, "prompts", "embedder"))

    others = [key(10), key(model="another"), key(history_share=1.0), key(anchors_by="longest"), key(describe=True)]
    assert len({key(), *others}) == 1 + len(others)
    assert key() == key(verdict=False)  # who is left out says that


def test_the_rule_is_topics_then_the_posterior_unless_a_signature_would_be_too_long() -> None:
    rule = BuildOptions("citation", anchors=1024).rule()
    assert (rule.anchors, rule.strength, rule.posterior) == (2, 0.5, PosteriorRule(anchors=1024, decay=250.0))
    assert BuildOptions("citation", anchors=1025).rule().posterior is None
    assert BuildOptions("citation", anchors=1).rule().anchors == 1
