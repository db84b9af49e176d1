"""The posterior mean: the step from the common row, along the anchors' rows, that a user's own items justify.

Around the common row the loss of a user's n output tokens is n(L₀ − x·z + ½ zᵀHz) for a step of zᵢ along each anchor's
row: xᵢ = −⟨g, rowᵢ⟩ with g the gradient of their mean loss a token (the signature), H the curvature, measured at build
(`bank/building/calibration.py`). With a prior N(0, I/λ) on z the answer is z = (nH + λI)⁻¹ n x. Steps may be negative,
little evidence makes small steps, and directions in which the loss bends sharply get smaller ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bank.errors import BankError
from bank.items.profile import Vectors


@dataclass(frozen=True, slots=True)
class Curvature:
    """H by its eigenvectors.

    Attributes:
        directions: [N, N], one in each column.
        bends: its eigenvalues [N], none negative.
    """

    directions: Vectors
    bends: Vectors

    @classmethod
    def of(cls, measured: Vectors) -> Curvature:
        """From a measured [N, N]: made symmetric, negative eigenvalues set to 0.

        Raises:
            BankError: when nothing bends, or a number is not finite: then it says nothing about how far to go.
        """
        h = np.asarray(measured, np.float64)
        if not np.isfinite(h).all():
            raise BankError("the curvature of this bank has numbers that are not finite: build it again")
        bends, directions = np.linalg.eigh((h + h.T) / 2)
        bends = np.clip(bends, 0.0, None)
        if not bends.any():
            raise BankError("the loss does not bend along any of this bank's rows: build it with --weights topic")
        return cls(directions, bends)

    @classmethod
    def load(cls, path: Path) -> Curvature:
        """Read what the build wrote.

        Raises:
            BankError: when it is missing or damaged.
        """
        try:
            return cls.of(np.load(path, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise BankError(f"cannot read {path}: {error}") from error

    def step(self, products: Vectors, tokens: int, decay: float) -> Vectors:
        """z [N].

        Args:
            products: x [N], nats a token.
            tokens: n.
            decay: λ in units of tr H / N.
        """
        x = self.directions.T @ np.asarray(products, np.float64)
        shrunk = tokens / (tokens * self.bends + decay * self.bends.mean())
        return np.asarray(self.directions @ (shrunk * x), np.float32)
