"""Anchors: chosen among people unlike each other, found in an index exact when small, and laid out on a map."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bank.building.options import BuildOptions
from bank.building.selection import (
    SERVED_ITEMS,
    held_out_people,
    person_embedding,
    select_anchors,
    spread,
)
from bank.errors import BankError
from bank.items.histories import History
from bank.items.profile import Item, Vectors, profile_embedding
from bank.items.tasks import get_task
from bank.lookup.index import AnchorIndex
from bank.lookup.projection import Projection
from bank.manifest import PosteriorRule
from server.settings import Settings

CHAT = get_task("chat")


def groups(*sizes: int) -> Vectors:
    """Tight groups of people far apart from each other."""
    rows = np.repeat(np.eye(len(sizes), dtype=np.float32), sizes, axis=0)
    return rows + np.random.default_rng(0).normal(scale=0.01, size=rows.shape).astype(np.float32)


def test_each_cluster_gives_the_first_of_its_longest_histories() -> None:
    lengths = [11, 30, 12, 50, 13, 14, 99, 15]
    assert select_anchors(groups(3, 2, 3), lengths, 3, seed=0) == [1, 3, 6]
    assert select_anchors(groups(3, 3), [20] * 6, 2, seed=0) == [0, 3]
    assert select_anchors(None, [11, 30, 12, 50, 12, 14], 3, seed=0) == [1, 3, 5]  # whatever they are about
    # K-means finds one cluster in five equal points: the empty ones go to the longest histories left.
    assert select_anchors(np.ones((5, 4), dtype=np.float32), [11, 15, 12, 14, 13], 3, seed=0) == [1, 3, 4]


@settings(max_examples=25)
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


def test_anchor_is_embedded_like_the_profile_a_gateway_keeps() -> None:
    class Circle:
        def embed(self, texts: list[str]) -> Vectors:
            angles = np.array([int(text) for text in texts]) / 600
            return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)

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


def test_people_with_plain_or_foreign_answers_are_not_held_out() -> None:
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


def test_rule_has_the_posterior_and_large_banks_use_directions() -> None:
    rule = BuildOptions("citation", anchors=1024).rule()
    assert (rule.anchors, rule.strength, rule.posterior) == (2, 0.5, PosteriorRule(decay=250.0))
    assert [BuildOptions("citation", anchors=many).wants_directions for many in (64, 65)] == [False, True]
    assert BuildOptions("citation", anchors=1).rule().anchors == 1


def unit_rows(count: int, dim: int, seed: int = 0, spread: float = 1.0) -> Vectors:
    """Random directions; their first dimension varies `spread` times as much as the last."""
    rows = np.random.default_rng(seed).normal(size=(count, dim)) * np.linspace(spread, 1, dim)
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_small_bank_is_searched_exactly() -> None:
    anchors, query = unit_rows(50, 16), unit_rows(1, 16, seed=1)[0]
    index = AnchorIndex.build(anchors)
    assert index.kind == "IndexFlatIP"
    similarities = anchors @ query
    expected = sorted(range(50), key=lambda i: -similarities[i])[:5]
    found = index.search(query, 5)
    assert [anchor for anchor, _ in found] == expected
    np.testing.assert_allclose([s for _, s in found], similarities[expected], rtol=1e-5)
    anchors = np.array([[0, 1], [1, 0], [1, 0]], dtype=np.float32)
    found = AnchorIndex.build(anchors).search(np.array([1, 0], dtype=np.float32), 10)
    assert [anchor for anchor, _ in found] == [1, 2, 0]  # of equal ones the first, and no more than there are


def test_large_index_is_hnsw_and_finds_nearly_all_neighbours() -> None:
    anchors = unit_rows(2_000, 16)
    index, exact = AnchorIndex.build(anchors, flat_limit=1_000), AnchorIndex.build(anchors)
    assert index.kind == "IndexHNSWFlat"
    found = [[dict(each.search(query, 5)).keys() for each in (index, exact)] for query in unit_rows(50, 16, seed=2)]
    assert sum(len(near & nearest) for near, nearest in found) >= 0.95 * 250


@pytest.mark.parametrize("flat_limit", [10_000, 100])
def test_the_same_anchors_give_the_same_file_and_it_reads_back(tmp_path: Path, flat_limit: int) -> None:
    anchors, query = unit_rows(300, 8), unit_rows(1, 8, seed=3)[0]
    index = AnchorIndex.build(anchors, flat_limit)
    index.save(tmp_path / "one")
    AnchorIndex.build(anchors, flat_limit).save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = AnchorIndex.load(tmp_path / "one")
    assert (loaded.kind, loaded.anchor_count, loaded.dim) == (index.kind, 300, 8)
    assert loaded.search(query, 4) == index.search(query, 4)


def test_what_is_no_embedding_no_index_and_no_map_is_refused(tmp_path: Path) -> None:
    for query in (np.zeros(3), np.zeros((1, 4)), np.array([0, 0, 0, np.nan])):
        with pytest.raises(BankError, match="4 finite numbers"):
            AnchorIndex.build(unit_rows(3, 4)).search(query, 2)
    (tmp_path / "anchors.faiss").write_bytes(b"not an index")
    with pytest.raises(BankError, match="not a FAISS index"):
        AnchorIndex.load(tmp_path / "anchors.faiss")
    with pytest.raises(BankError, match="needs embeddings"):
        AnchorIndex.build(np.zeros((0, 4), dtype=np.float32))
    path = tmp_path / "map.json"
    for content in (None, "", "{}", "[]", '{"mean": 1, "axes": 1, "anchors": 1, "explained": 1}'):
        if content is not None:
            path.write_text(content)
        with pytest.raises(BankError, match=r"map\.json"):
            Projection.load(path, 30, 16)
    Projection.of(unit_rows(30, 16)).save(path)
    with pytest.raises(BankError, match="not a map of 31 anchors"):
        Projection.load(path, 31, 16)


def test_search_uses_one_thread_and_restores_thread_counts() -> None:
    """Torch counts its threads where FAISS does, if both share a runtime; each thread has a number of its own."""
    import faiss

    inner, query = faiss.IndexFlatIP(16), unit_rows(1, 16)[0]
    inner.add(unit_rows(50, 16))
    during: list[int] = []

    class Watched:
        d, ntotal = inner.d, inner.ntotal

        def search(self, vectors: Vectors, k: int) -> tuple[Vectors, Vectors]:
            during.append(int(faiss.omp_get_max_threads()))
            return inner.search(vectors, k)

    def after() -> tuple[int, int]:
        torch.set_num_threads(3)
        faiss.omp_set_num_threads(3)
        AnchorIndex(Watched()).search(query, 2)
        return int(faiss.omp_get_max_threads()), torch.get_num_threads()

    before = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as pool:
            assert (after(), pool.submit(after).result()) == ((3, 3), (3, 3))
    finally:
        torch.set_num_threads(before)
        faiss.omp_set_num_threads(before)
    assert during == [1, 1]


def test_a_map_is_what_a_singular_value_decomposition_says() -> None:
    vectors = unit_rows(40, 16, spread=3)
    projection = Projection.of(vectors)
    left, values, _ = np.linalg.svd(vectors.astype(np.float64) - vectors.mean(axis=0), full_matrices=False)
    wanted = left[:, :2] * values[:2]
    for axis in range(2):
        places = projection.anchors[:, axis]
        assert abs(places @ wanted[:, axis]) == pytest.approx(places @ places, rel=1e-4)
    assert projection.explained == pytest.approx(values[:2] ** 2 / (values**2).sum(), abs=1e-5)
    assert projection.at(vectors[3]) == pytest.approx(tuple(projection.anchors[3]), abs=1e-5)
    assert projection.at(-vectors[3]) != pytest.approx(tuple(projection.anchors[3]), abs=0.1)


@pytest.mark.parametrize(("count", "axes"), [(1, 0), (2, 1), (3, 2), (30, 2)])
def test_few_anchors_have_a_map_too_and_always_the_same_file(count: int, axes: int, tmp_path: Path) -> None:
    projection = Projection.of(unit_rows(count, 16, spread=3))
    assert sum(share > 0 for share in projection.explained) == axes
    assert count > 3 or sum(projection.explained) == pytest.approx(min(axes, 1), abs=1e-5)
    assert projection.anchors.shape == (count, 2)
    for name in ("one", "two"):
        Projection.of(unit_rows(count, 16, spread=3)).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    read = Projection.load(tmp_path / "one", count, 16)
    assert read.explained == projection.explained
    assert all(np.array_equal(getattr(read, name), getattr(projection, name)) for name in ("mean", "axes", "anchors"))
