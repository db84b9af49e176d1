"""Directions: the rows of a bank of many anchors. Each is a mixture of the anchors' own rows.

They are the leading eigenvectors of the curvature along the anchors' rows, so that a bank, a signature and a fusion do
not grow with the number of anchors. A step of 1 along any of them is one standard deviation of the prior.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters.recipe import MAX_STEP, STEPS_PER_DEVIATION, FusionRecipe
from bank.errors import BankError
from bank.items.profile import Vectors
from bank.lookup.signature import Curvature
from bank.manifest import BankManifest

NEAREST = 3  # number of anchors that describe a user


@dataclass(frozen=True, slots=True)
class Directions:
    """Where each anchor lies: the coordinates [N, K] that give its own row, and the same in the loss's metric."""

    coordinates: Vectors
    metric: Vectors  # M [K, K] with MMᵀ = H
    unit: Vectors  # [N, K], rows of length 1

    @classmethod
    def of(cls, coordinates: Vectors, curvature: Curvature) -> Directions:
        metric = curvature.eigenvectors * np.sqrt(curvature.eigenvalues)
        unit = np.asarray(coordinates, np.float64) @ metric
        return cls(coordinates, metric, unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-30))

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

    def mixture(self, weights: Iterable[tuple[int, float]]) -> Vectors:
        """Return the steps [K] to the sum of these anchors' rows with these weights."""
        steps: Vectors = np.sum([weight * self.coordinates[anchor] for anchor, weight in weights], axis=0)
        return steps

    def nearest(self, steps: Vectors) -> list[tuple[int, float]]:
        """Return the anchors whose rows change the loss most like these steps [K], with the cosine, nearest first."""
        here = np.asarray(steps, np.float64) @ self.metric
        cosines = self.unit @ here / max(float(np.linalg.norm(here)), 1e-30)
        return [(int(anchor), float(cosines[anchor])) for anchor in np.argsort(-cosines, kind="stable")[:NEAREST]]


def recipe_of_directions(manifest: BankManifest, steps: Vectors, share: float = 1.0) -> FusionRecipe:
    """Multiply each step by `share`, 0 to 1, and round it to a sixteenth; without steps the common row remains."""
    rounded = np.clip(np.rint(share * STEPS_PER_DEVIATION * steps), -MAX_STEP, MAX_STEP).astype(int).tolist()
    return FusionRecipe(manifest.short, manifest.method, True, (), steps=tuple(rounded) if any(rounded) else ())
