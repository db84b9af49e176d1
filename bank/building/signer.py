"""Making signatures: gradients at one place of a bank, and what they say about each anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from adapters.errors import FusionError
from adapters.flat import cut_b
from adapters.lora import LoraWeights
from adapters.matrix import MetaMatrix
from adapters.training.attached import attached
from adapters.training.example import Example, output_tokens
from adapters.training.loss import b_gradient, mean_loss
from bank.items.profile import Vectors
from bank.lookup.signature import Signature, empty_signature


class Signer:
    """Takes gradients at a bank's centre, the common row and the mean of all anchors, or at the common row alone.

    Args:
        model: the base model.
        matrix: the rows of a `shared` bank.
        at_common: where; the posterior's signatures are of the common row.

    Raises:
        FusionError: when the rows have no A in common: their B cannot be compared.
    """

    def __init__(self, model: Any, matrix: MetaMatrix, *, at_common: bool = False) -> None:
        if matrix.shared_a is None:
            raise FusionError("signatures need a bank of method `shared`")
        self._model = model
        self._matrix = matrix
        self._layout = matrix.layout
        rows = [] if at_common else [matrix.row(i).float() for i in range(matrix.anchors)]
        self._mean = sum(rows, torch.zeros(matrix.layout.b_numbers)) / matrix.anchors
        self._common = matrix.common_row.float() if matrix.common else torch.zeros(matrix.layout.b_numbers)
        self._a = {name: a.float() for name, a in matrix.frozen_a.items()}
        self.centre = self._lora(self._common + self._mean)

    def signature(self, bank: str, examples: Sequence[Example]) -> Signature:
        """The signature of some items, for the bank with these 8 hex digits; empty without any or if not finite."""
        if not examples:
            return empty_signature(bank, self._matrix.anchors)
        made = Signature(bank, output_tokens(examples), self.products(examples))
        return made if made.finite else empty_signature(bank, self._matrix.anchors)

    def products(self, examples: Sequence[Example]) -> Vectors:
        """By how many nats a token each anchor lowers the examples' loss, to first order, [N]."""
        gradient = b_gradient(self._model, self._layout, self.centre, examples)
        found: Vectors = (torch.dot(gradient, self._mean) - self._along_rows(gradient)).numpy()
        return found

    def slopes(self, examples: Sequence[Example], beyond: int | None = None) -> Vectors:
        """⟨g, rowᵢ⟩ [N], how the loss changes along each row, at the centre or an anchor's row beyond it."""
        place = self.centre
        if beyond is not None:
            place = self._lora(self._common + self._mean + self._matrix.row(beyond).float())
        gradient = b_gradient(self._model, self._layout, place, examples)
        found: Vectors = self._along_rows(gradient).double().numpy()
        return found

    def measured_gains(self, examples: Sequence[Example]) -> Vectors:
        """By how many nats a token each anchor lowers the examples' loss, against the centre: one pass each, [N]."""
        if not examples:
            return np.zeros(self._matrix.anchors, np.float32)
        with attached(self._model, self.centre) as here:
            centre, losses = mean_loss(here.model, examples), []
            for anchor in range(self._matrix.anchors):
                here.put(self._lora(self._common + self._matrix.row(anchor).float()))
                losses.append(mean_loss(here.model, examples))
        return np.array([centre - loss for loss in losses], np.float32)

    def _along_rows(self, gradient: torch.Tensor) -> torch.Tensor:
        """⟨gradient, rowᵢ⟩ [N], float32."""
        return torch.stack([torch.dot(gradient, self._matrix.row(i).float()) for i in range(self._matrix.anchors)])

    def _lora(self, flat: torch.Tensor) -> LoraWeights:
        return LoraWeights(self._layout.rank, self._a, cut_b(self._layout, flat))
