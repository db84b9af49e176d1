"""The map of a bank: PCA, the same for the same embeddings, and not needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bank.errors import BankError
from bank.lookup.atlas import Atlas


def embeddings(count: int, dim: int = 16, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(size=(count, dim)) * np.linspace(3, 1, dim)
    return (drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).astype(np.float32)


def test_it_is_what_a_singular_value_decomposition_says() -> None:
    vectors = embeddings(40)
    atlas = Atlas.of(vectors)
    centred = vectors.astype(np.float64) - vectors.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    wanted = left[:, :2] * values[:2]
    for axis in range(2):
        places = atlas.anchors[:, axis]
        assert abs(places @ wanted[:, axis]) == pytest.approx(places @ places, rel=1e-4)
    assert atlas.explained == pytest.approx(values[:2] ** 2 / (values**2).sum(), abs=1e-5)


def test_an_anchors_own_embedding_lies_where_the_anchor_does_and_a_far_one_elsewhere() -> None:
    vectors = embeddings(12)
    atlas = Atlas.of(vectors)
    assert atlas.at(vectors[3]) == pytest.approx(tuple(atlas.anchors[3]), abs=1e-5)
    assert atlas.at(-vectors[3]) != pytest.approx(tuple(atlas.anchors[3]), abs=0.1)


@pytest.mark.parametrize(("count", "axes"), [(1, 0), (2, 1), (3, 2), (30, 2)])
def test_few_anchors_have_a_map_too_always_the_same_file_and_it_reads_back(
    count: int, axes: int, tmp_path: Path
) -> None:
    atlas = Atlas.of(embeddings(count))
    assert sum(share > 0 for share in atlas.explained) == axes
    assert count > 3 or sum(atlas.explained) == pytest.approx(min(axes, 1), abs=1e-5)
    assert atlas.anchors.shape == (count, 2)
    assert np.isfinite(atlas.anchors).all()
    for name in ("one", "two"):
        Atlas.of(embeddings(count)).save(tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    read = Atlas.load(tmp_path / "one", count, 16)
    assert read.explained == atlas.explained
    assert all(np.array_equal(getattr(read, name), getattr(atlas, name)) for name in ("mean", "axes", "anchors"))


@pytest.mark.parametrize("content", [None, "", "{}", "[]", '{"mean": 1, "axes": 1, "anchors": 1, "explained": 1}'])
def test_what_is_no_map_is_refused_with_its_path(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "map.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BankError, match=r"map\.json"):
        Atlas.load(path, 30, 16)
    Atlas.of(embeddings(30)).save(path)
    with pytest.raises(BankError, match="not a map of 31 anchors"):
        Atlas.load(path, 31, 16)
