"""A user's own items as evidence for anchors: the signature, and what it predicts.

To first order an anchor changes the loss of a user's items by an inner product, NLLᵢ ≈ a⟨g, Bᵢ - mean⟩ + cᵢ, with g the
gradient of that loss with respect to B at the bank's centre (the common row and the mean of all anchors). So one pass
over the items speaks about all anchors at once. Only the gradient's inner product with each anchor is kept:
a few numbers instead of a million, and nothing is lost, for nothing else is ever asked of it. a and cᵢ are calibrated
at build (`bank/building/calibration.py`).

Plain numpy: the gateway reads signatures; only the build and the worker make them (`bank/building/signer.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bank.items.profile import Vectors

MAX_ITEMS = 32
"""How many of a user's newest items a signature is made from."""

MAX_ANCHORS = 1024
"""Most anchors of a bank with signatures: each costs a number per user, and users must stay small."""


@dataclass(frozen=True, slots=True)
class Signature:
    """What a user's items would do to the model.

    Attributes:
        bank: the 8 hex digits of the bank it belongs to.
        tokens: n, the items' output tokens: how much evidence there is; 0 when there was none.
        products: -⟨g, Bᵢ - mean⟩, [N] float32: to first order, by how much each anchor lowers the loss of the items.
    """

    bank: str
    tokens: int
    products: Vectors

    @property
    def finite(self) -> bool:
        """Whether its products and their length are finite in float32."""
        return self.length <= float(np.finfo(np.float32).max)

    @property
    def length(self) -> float:
        """The length of the products as a vector."""
        return float(np.linalg.norm(self.products.astype(np.float64)))


def empty_signature(bank: str, anchors: int) -> Signature:
    """A signature that says nothing, for items that teach nothing.

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
