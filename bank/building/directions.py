"""Turn the rows of many anchors into fewer directions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from adapters.fusion import CHUNK_NUMBERS
from bank.items.profile import Vectors
from bank.lookup.signature import Curvature
from bank.manifest import PosteriorRule


@dataclass(frozen=True, slots=True)
class DirectionRows:
    """K directions: their rows [K, D], each anchor's coordinates [N, K] and the curvature along them, H [K, K]."""

    rows: torch.Tensor
    coordinates: Vectors
    curvature: Vectors

    @property
    def rule(self) -> PosteriorRule:
        """The rule whose prior has a standard deviation of 1 along each direction."""
        return PosteriorRule(decay=float(1 / np.diagonal(self.curvature).mean()))


def make_directions(rows: torch.Tensor, curvature: Curvature, count: int, deviation: float) -> DirectionRows:
    """Take the `count` leading eigenvectors of the curvature along the rows [N, D], each `deviation` long.

    `deviation` is the prior's, of one step along an anchor's row.
    """
    leading = curvature.eigenvectors[:, ::-1][:, :count]
    leading = leading * np.sign(leading[np.abs(leading).argmax(axis=0), range(count)])  # fix the arbitrary sign
    mixing = torch.from_numpy((deviation * leading.T).astype(np.float32))
    pieces = [mixing @ part.float() for part in torch.split(rows, CHUNK_NUMBERS, dim=1)]
    values = curvature.eigenvalues[::-1][:count]
    return DirectionRows(torch.cat(pieces, 1), (leading / deviation).astype(np.float32), np.diag(deviation**2 * values))
