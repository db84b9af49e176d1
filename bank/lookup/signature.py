"""A user's own items as evidence: the signature, and the posterior mean, the step that it justifies.

Around the common row the loss of a user's n output tokens is n(L₀ − x·z + ½ zᵀHz) for a step of zᵢ along each anchor's
row: xᵢ = −⟨g, rowᵢ⟩ with g the gradient of their mean loss a token, H the curvature, measured at build. With a prior
N(0, I/λ) on z the answer is z = (nH + λI)⁻¹ n x. Of the gradient only x is kept, because nothing else is asked of it.
Plain numpy: the gateway reads signatures; the build and the worker make them (`bank/building/signer.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bank.errors import BankError
from bank.items.profile import Vectors

MAX_ITEMS = 32  # how many of a user's newest items a signature is made from
MAX_ANCHORS = 1024  # of a bank with signatures: each costs a number per user, and users must stay small


@dataclass(frozen=True, slots=True)
class Signature:
    """What a user's items would do to the model."""

    bank: str  # the 8 hex digits of the bank it belongs to
    tokens: int  # n, the items' output tokens: how much evidence there is
    products: Vectors  # x [N] float32: to first order, by how much each anchor's row lowers the loss, nats a token

    @property
    def finite(self) -> bool:
        """Whether its products and their length are finite in float32."""
        return self.length <= float(np.finfo(np.float32).max)

    @property
    def length(self) -> float:
        return float(np.linalg.norm(self.products.astype(np.float64)))

    def is_usable_for(self, bank: str) -> bool:
        """Whether there is evidence in it for the bank with these 8 hex digits."""
        return self.tokens > 0 and self.bank == bank and bool(np.isfinite(self.products).all())


def empty_signature(bank: str, anchors: int) -> Signature:
    """A signature that says nothing, for items that teach nothing."""
    return Signature(bank, 0, np.zeros(anchors, np.float32))


@dataclass(frozen=True, slots=True)
class Curvature:
    """H by its eigenvectors [N, N], one in each column, and eigenvalues [N], none negative."""

    eigenvectors: Vectors
    eigenvalues: Vectors

    @classmethod
    def of(cls, measured: Vectors) -> Curvature:
        """From a measured [N, N]: made symmetric, negative eigenvalues set to 0; BankError where nothing bends."""
        h = np.asarray(measured, np.float64)
        if not np.isfinite(h).all():
            raise BankError("the curvature of this bank has numbers that are not finite: build it again")
        eigenvalues, eigenvectors = np.linalg.eigh((h + h.T) / 2)
        eigenvalues = np.clip(eigenvalues, 0.0, None)
        if not eigenvalues.any():
            raise BankError(
                "the loss does not bend along any of this bank's rows: build it with other people, more --steps or a "
                "higher --learning-rate"
            )
        return cls(eigenvectors, eigenvalues)

    @classmethod
    def load(cls, path: Path) -> Curvature:
        try:
            return cls.of(np.load(path, allow_pickle=False))
        except (OSError, ValueError) as error:
            raise BankError(f"cannot read {path}: {error}") from error

    def step(self, signature: Signature, decay: float) -> Vectors:
        """z [N]; `decay` is λ in units of tr H / N."""
        x = self.eigenvectors.T @ np.asarray(signature.products, np.float64)
        shrunk = signature.tokens / (signature.tokens * self.eigenvalues + decay * self.eigenvalues.mean())
        return np.asarray(self.eigenvectors @ (shrunk * x), np.float32)
