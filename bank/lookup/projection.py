"""A bank's two-dimensional map for display: the principal components of its anchors' embeddings, computed at build."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bank.errors import BankError
from bank.items.profile import Vectors

_AXES = 2
_DIGITS = 6  # decimals; coarser than rounding differences between CPUs, so that the same anchors give the same file

Numbers = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Projection:
    """A map: the anchors' mean embedding [E], the first two principal components [2, E], and the anchors [N, 2]."""

    mean: Numbers
    axes: Numbers
    explained: tuple[float, ...]  # share of the variance along each axis; an axis without variance is zero
    anchors: Numbers

    @classmethod
    def of(cls, embeddings: Vectors) -> Projection:
        vectors = np.asarray(embeddings, np.float64)
        mean = vectors.mean(axis=0)
        centred = vectors - mean
        variances, components = np.linalg.eigh(centred.T @ centred)  # in ascending order
        shares = variances.clip(0) / (float(variances.clip(0).sum()) or 1.0)
        axes, explained = np.zeros((_AXES, len(mean))), []
        for axis in range(_AXES):
            explained.append(round(float(shares[-1 - axis]), _DIGITS))
            if explained[axis]:
                component = components[:, -1 - axis]
                axes[axis] = component * np.sign(component[np.abs(component).argmax()])  # fix the arbitrary sign
        axes = axes.round(_DIGITS)
        return cls(mean.round(_DIGITS), axes, tuple(explained), (centred @ axes.T).round(_DIGITS))

    @classmethod
    def load(cls, path: Path, anchors: int, dim: int) -> Projection:
        """Load a map; BankError unless it has N = `anchors` and E = `dim`."""
        try:
            read = json.loads(path.read_text("utf-8"))
            mean, axes, places = (np.asarray(read[name], np.float64) for name in ("mean", "axes", "anchors"))
            explained = tuple(map(float, read["explained"]))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BankError(f"cannot read the map {path}: {error}") from error
        if (mean.shape, axes.shape, places.shape) != ((dim,), (_AXES, dim), (anchors, _AXES)):
            raise BankError(f"{path} is not a map of {anchors} anchors in {dim} dimensions: build the bank again")
        return cls(mean, axes, explained, places)

    def save(self, path: Path) -> None:
        arrays = {"mean": self.mean, "axes": self.axes, "anchors": self.anchors}
        content = {"explained": self.explained} | {name: array.tolist() for name, array in arrays.items()}
        path.write_text(json.dumps(content) + "\n", "utf-8")

    def at(self, embedding: Vectors) -> tuple[float, float]:
        """Return the map coordinates of an embedding [E]."""
        x, y = (self.axes @ (np.asarray(embedding, np.float64) - self.mean)).round(_DIGITS).tolist()
        return x, y
