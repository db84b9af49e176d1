"""Directions: the rows of a bank of many anchors. Each is a mixture of the anchors' own rows.

They are the leading eigenvectors of the curvature along the anchors' rows, so that a bank, a signature and a fusion do
not grow with the number of anchors. A step of 1 along any of them is one standard deviation of the prior.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from adapters.recipe import MAX_STEP, STEPS_PER_DEVIATION, FusionRecipe
from bank.errors import BankError
from bank.items.profile import Vectors
from bank.lookup.index import AnchorIndex
from bank.lookup.signature import Curvature
from bank.manifest import BankManifest

NEAREST = 3  # number of anchors that describe a user
COMPARED = 128  # leading directions of the loss's metric that they are compared along
_REMEMBERED = 4096  # number of profiles whose nearest anchors are remembered, for gateways ask for each answer


@dataclass(frozen=True, slots=True)
class Directions:
    """Where each anchor lies: the coordinates [N, K] that give its own row, and a search in the loss's metric."""

    coordinates: Vectors
    _search: Callable[[bytes], list[tuple[int, float]]]  # by the steps [K], as float32

    @classmethod
    def of(cls, coordinates: Vectors, curvature: Curvature) -> Directions:
        metric = (curvature.eigenvectors * np.sqrt(curvature.eigenvalues))[:, -COMPARED:]  # of M with MMᵀ = H
        unit = np.asarray(coordinates, np.float64) @ metric
        unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-30)
        metric, index = metric.astype(np.float32), AnchorIndex.build(unit, len(unit))

        def search(steps: bytes) -> list[tuple[int, float]]:
            here = np.frombuffer(steps, np.float32) @ metric
            return index.search(here / max(float(np.linalg.norm(here)), 1e-30), NEAREST)

        return cls(coordinates, lru_cache(_REMEMBERED)(search))

    @classmethod
    def load(cls, path: Path, manifest: BankManifest, curvature: Curvature) -> Directions:
        try:
            coordinates = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise BankError(f"cannot read {path}: {error}") from error
        expected = (len(manifest.anchors), manifest.directions)
        if coordinates.shape != expected:
            raise BankError(f"{path} has shape {coordinates.shape}, but the manifest says {expected}: copy it again")
        return cls.of(coordinates, curvature)

    def nearest(self, steps: Vectors) -> list[tuple[int, float]]:
        """Return the anchors whose rows change the loss most like these steps [K], with the cosine, nearest first."""
        return self._search(np.asarray(steps, np.float32).tobytes())


def recipe_of_directions(manifest: BankManifest, steps: Vectors, scale: float = 1.0) -> FusionRecipe:
    """Multiply each step by `scale`, 0 to 1, and round it to a sixteenth; without steps the common row remains."""
    rounded = np.clip(np.rint(scale * STEPS_PER_DEVIATION * steps), -MAX_STEP, MAX_STEP).astype(int).tolist()
    return FusionRecipe(manifest.short, manifest.method, True, (), steps=tuple(rounded) if any(rounded) else ())
