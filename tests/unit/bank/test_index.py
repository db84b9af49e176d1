"""The anchor index and the map: exact when small, good when large, the same files from the same input."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from bank.errors import BankError
from bank.items.profile import Vectors
from bank.lookup.atlas import Atlas
from bank.lookup.index import AnchorIndex


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


def test_above_the_limit_the_index_is_hnsw_and_finds_nearly_all_neighbours() -> None:
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
    assert (loaded.kind, loaded.anchors, loaded.dim) == (index.kind, 300, 8)
    assert loaded.search(query, 4) == index.search(query, 4)


def test_what_is_no_embedding_and_no_index_is_refused(tmp_path: Path) -> None:
    for query in (np.zeros(3), np.zeros((1, 4)), np.array([0, 0, 0, np.nan])):
        with pytest.raises(BankError, match="4 finite numbers"):
            AnchorIndex.build(unit_rows(3, 4)).search(query, 2)
    (tmp_path / "anchors.faiss").write_bytes(b"not an index")
    with pytest.raises(BankError, match="not a FAISS index"):
        AnchorIndex.load(tmp_path / "anchors.faiss")
    with pytest.raises(BankError, match="needs embeddings"):
        AnchorIndex.build(np.zeros((0, 4), dtype=np.float32))


def test_a_search_takes_one_thread_wherever_it_runs_and_leaves_the_others_to_who_trains_after_it() -> None:
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
    atlas = Atlas.of(vectors)
    left, values, _ = np.linalg.svd(vectors.astype(np.float64) - vectors.mean(axis=0), full_matrices=False)
    wanted = left[:, :2] * values[:2]
    for axis in range(2):
        places = atlas.anchors[:, axis]
        assert abs(places @ wanted[:, axis]) == pytest.approx(places @ places, rel=1e-4)
    assert atlas.explained == pytest.approx(values[:2] ** 2 / (values**2).sum(), abs=1e-5)
    assert atlas.at(vectors[3]) == pytest.approx(tuple(atlas.anchors[3]), abs=1e-5)
    assert atlas.at(-vectors[3]) != pytest.approx(tuple(atlas.anchors[3]), abs=0.1)


@pytest.mark.parametrize(("count", "axes"), [(1, 0), (2, 1), (3, 2), (30, 2)])
def test_few_anchors_have_a_map_too_and_always_the_same_file(count: int, axes: int, tmp_path: Path) -> None:
    atlas = Atlas.of(unit_rows(count, 16, spread=3))
    assert sum(share > 0 for share in atlas.explained) == axes
    assert count > 3 or sum(atlas.explained) == pytest.approx(min(axes, 1), abs=1e-5)
    assert atlas.anchors.shape == (count, 2)
    for name in ("one", "two"):
        Atlas.of(unit_rows(count, 16, spread=3)).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    read = Atlas.load(tmp_path / "one", count, 16)
    assert read.explained == atlas.explained
    assert all(np.array_equal(getattr(read, name), getattr(atlas, name)) for name in ("mean", "axes", "anchors"))


def test_what_is_no_map_is_refused_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "map.json"
    for content in (None, "", "{}", "[]", '{"mean": 1, "axes": 1, "anchors": 1, "explained": 1}'):
        if content is not None:
            path.write_text(content)
        with pytest.raises(BankError, match=r"map\.json"):
            Atlas.load(path, 30, 16)
    Atlas.of(unit_rows(30, 16)).save(path)
    with pytest.raises(BankError, match="not a map of 31 anchors"):
        Atlas.load(path, 31, 16)
