"""A FAISS inner-product index of the anchors' embeddings: exact for small banks, HNSW for large ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bank.errors import BankError
from bank.items.profile import Vectors

FLAT_LIMIT = 10_000  # above this many anchors the index is approximate
_LINKS, _BUILD_DEPTH, _SEARCH_DEPTH = 32, 200, 128  # HNSW's M, efConstruction and efSearch


class AnchorIndex:
    """Finds the anchors nearest to a profile. Searching is thread-safe."""

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def build(cls, embeddings: Vectors, flat_limit: int = FLAT_LIMIT) -> AnchorIndex:
        """Index the anchors' embeddings [N, E], in anchor order. The same input gives the same file."""
        import faiss

        vectors = np.ascontiguousarray(embeddings, dtype=np.float32)
        if vectors.ndim != 2 or not len(vectors):
            raise BankError(f"an index needs embeddings of shape [N, E], got shape {vectors.shape}")
        if len(vectors) <= flat_limit:
            flat = faiss.IndexFlatIP(vectors.shape[1])
            flat.add(vectors)
            return cls(flat)
        index = faiss.IndexHNSWFlat(vectors.shape[1], _LINKS, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = _BUILD_DEPTH
        index.hnsw.efSearch = _SEARCH_DEPTH
        with _one_thread():  # links depend on the insertion order; one thread gives the same file every time
            index.add(vectors)
        return cls(index)

    @classmethod
    def load(cls, path: Path) -> AnchorIndex:
        import faiss

        try:
            return cls(faiss.read_index(str(path)))
        except RuntimeError as error:
            raise BankError(f"{path} is not a FAISS index: copy the bank again or build it again") from error

    def save(self, path: Path) -> None:
        import faiss

        faiss.write_index(self._index, str(path))

    @property
    def anchor_count(self) -> int:
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        return int(self._index.d)

    @property
    def kind(self) -> str:
        return type(self._index).__name__

    def vectors(self, anchors: Sequence[int]) -> Vectors:
        """Return the embeddings [n, E] of the anchors with these n indices."""
        vectors: Vectors = self._index.reconstruct_batch(np.asarray(anchors, np.int64))
        return vectors

    def search(self, embedding: Vectors, k: int) -> list[tuple[int, float]]:
        """Return up to `k` anchors and their inner products with an embedding [E], highest first, ties by anchor."""
        query: npt.NDArray[np.float32] = np.ascontiguousarray(embedding, dtype=np.float32)
        if query.shape != (self.dim,) or not np.isfinite(query).all():
            raise BankError(f"an embedding of this bank has {self.dim} finite numbers, got shape {query.shape}")
        with _one_thread():  # one query takes less time than waiting for a busy core
            [similarities], [anchors] = self._index.search(query[None], min(k, self.anchor_count))
        near = [(int(a), float(s)) for a, s in zip(anchors, similarities, strict=True) if a >= 0]  # -1: no anchor
        return sorted(near, key=lambda pair: (-pair[1], pair[0]))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limit FAISS to one thread in the block; the limit is per calling thread and also applies to torch."""
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)
