"""A user's own items as evidence for anchors: the signature, and what it predicts.

To first order an anchor changes the loss of a user's items by an inner product, NLLᵢ ≈ a⟨g, Bᵢ - mean⟩ + cᵢ, with g the
gradient of that loss with respect to B at the bank's centre (the common row and the mean of all anchors). So one pass
over the items speaks about all anchors at once. What is kept of the gradient is its inner product with each anchor:
all that is ever asked of it, a few numbers instead of a million, and nothing is lost. a and cᵢ are calibrated
at build (`bank/building/calibration.py`).

Plain numpy: the gateway reads signatures, only the build and the worker make them (`bank/building/signer.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bank.items.profile import Vectors

MAX_ITEMS = 32
"""Newest items of a user that a signature is made of."""

MAX_ANCHORS = 1024
"""A signature has a number for each anchor; a user shall stay small."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What a user's items would do to the model.

    Attributes:
        bank: the 8 hex digits of the bank it belongs to.
        tokens: n, the items' output tokens: how much evidence it is; 0 when there was none.
        products: -⟨g, Bᵢ - mean⟩, [N] float32: to first order, by how much each anchor lowers the loss of the items.
    """

    bank: str
    tokens: int
    products: Vectors

    @property
    def finite(self) -> bool:
        """Whether its numbers and their length are numbers that float32 has."""
        return self.length <= float(np.finfo(np.float32).max)

    @property
    def length(self) -> float:
        """Of the products as a vector."""
        return float(np.linalg.norm(self.products.astype(np.float64)))


def empty_signature(bank: str, anchors: int) -> Signature:
    """One that says nothing: what there is when items teach nothing.

    Args:
        bank: the 8 hex digits of the bank it belongs to.
        anchors: N.
    """
    return Signature(bank, 0, np.zeros(anchors, np.float32))


def predicted_gains(signature: Signature, slope: float, offsets: Vectors) -> Vectors:
    """By how many nats a token each anchor lowers the loss of the user's items, against the centre, [N].

    Args:
        signature: the user's.
        slope: a.
        offsets: c, [N].
    """
    return np.asarray(slope * signature.products - offsets, np.float32)
