"""The anchor index: exact when small, good when large, the same file from the same input."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from bank.errors import BankError
from bank.items.profile import Vectors
from bank.lookup.index import AnchorIndex


def unit_rows(count: int, dim: int, seed: int = 0) -> Vectors:
    rows = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_a_small_bank_is_searched_exactly() -> None:
    anchors, query = unit_rows(50, 16), unit_rows(1, 16, seed=1)[0]
    index = AnchorIndex.build(anchors)
    assert index.kind == "IndexFlatIP"
    similarities = anchors @ query
    expected = sorted(range(50), key=lambda i: -similarities[i])[:5]
    found = index.search(query, 5)
    assert [anchor for anchor, _ in found] == expected
    np.testing.assert_allclose([s for _, s in found], similarities[expected], rtol=1e-5)


def test_above_the_limit_the_index_is_hnsw_and_finds_nearly_all_neighbours() -> None:
    anchors = unit_rows(2_000, 16)
    index = AnchorIndex.build(anchors, flat_limit=1_000)
    assert index.kind == "IndexHNSWFlat"
    exact = AnchorIndex.build(anchors)
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


def test_ties_are_broken_by_anchor_and_asking_for_more_than_there_are_gives_them_all() -> None:
    anchors = np.array([[0, 1], [1, 0], [1, 0]], dtype=np.float32)
    found = AnchorIndex.build(anchors).search(np.array([1, 0], dtype=np.float32), 10)
    assert [anchor for anchor, _ in found] == [1, 2, 0]


@pytest.mark.parametrize("query", [np.zeros(3), np.zeros((1, 4)), np.array([0, 0, 0, np.nan])])
def test_an_embedding_of_another_size_or_not_finite_is_refused(query: Vectors) -> None:
    with pytest.raises(BankError, match="4 finite numbers"):
        AnchorIndex.build(unit_rows(3, 4)).search(query, 2)


def test_a_file_that_is_no_index_and_no_anchors_are_refused(tmp_path: Path) -> None:
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
