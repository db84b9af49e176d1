"""Turn the rows of many anchors into fewer directions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bank.items.profile import Vectors
from bank.lookup.signature import Curvature
from bank.manifest import PosteriorRule

MIXED_AT_ONCE, READ_NUMBERS = 8, 1 << 20  # directions made in one pass over the rows; numbers of the rows read at once


@dataclass(frozen=True, slots=True)
class DirectionRows:
    """K directions: how their rows mix the anchors' [K, N], each anchor's coordinates [N, K], H along them [K, K]."""

    mixing: torch.Tensor
    coordinates: Vectors
    curvature: Vectors

    def mixed(self, rows: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield each direction's row [D], given the anchors' [N, D]: a few at a time, and so of few columns."""
        width = max(1, READ_NUMBERS // len(rows))
        for weights in torch.split(self.mixing, MIXED_AT_ONCE):
            rotated = torch.empty(len(weights), rows[0].numel())
            for position, columns in enumerate(torch.split(rotated, width, dim=1)):
                read = [row[position * width :][:width] for row in rows]
                torch.mm(weights, torch.stack(read).float(), out=columns)
            yield from rotated

    @property
    def rule(self) -> PosteriorRule:
        """The rule whose prior has a standard deviation of 1 along each direction."""
        return PosteriorRule(decay=float(1 / np.diagonal(self.curvature).mean()))


def make_directions(curvature: Curvature, count: int, deviation: float) -> DirectionRows:
    """Take the `count` leading eigenvectors along the anchors' rows, as long as `deviation`, the prior's of a step."""
    leading = curvature.eigenvectors[:, ::-1][:, :count]
    leading = leading * np.sign(leading[np.abs(leading).argmax(axis=0), range(count)])  # fix the arbitrary sign
    mixing = torch.from_numpy((deviation * leading.T).astype(np.float32))
    values = curvature.eigenvalues[::-1][:count]
    return DirectionRows(mixing, (leading / deviation).astype(np.float32), np.diag(deviation**2 * values))
