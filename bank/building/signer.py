"""Gradients at a bank's common row: users' signatures, and the curvature of the loss along the anchors' rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from adapters.flat import cut_a, cut_b
from adapters.lora import LoraWeights
from adapters.matrix import MetaMatrix
from adapters.training.example import Example, output_tokens
from adapters.training.loss import b_gradient
from bank.building.options import BuildOptions
from bank.building.resume import Workbench
from bank.building.rows import RowProgress
from bank.items.histories import History
from bank.items.profile import Vectors
from bank.items.prompt import ChatTokenizer, encode_pair
from bank.items.tasks import Task
from bank.lookup.signature import Signature, empty_signature

POOLED_ITEMS, ITEMS_PER_PERSON = 64, 2  # maximum items for measuring the curvature: in total, and per person


class Signer:
    """Computes gradients with respect to B at a bank's common row; FusionError without a common row or a shared A."""

    def __init__(self, model: Any, matrix: MetaMatrix) -> None:
        self._model = model
        self._matrix = matrix
        self._layout = matrix.layout
        self._a = {name: a.float() for name, a in cut_a(matrix.layout, matrix.frozen).items()}
        self._common = matrix.rows[matrix.common_index].float()

    def signature(self, bank: str, examples: Sequence[Example]) -> Signature:
        """Return the items' signature for `bank` (8 hex digits); empty if there are no items or it is not finite."""
        if not examples:
            return empty_signature(bank, self._matrix.anchors)
        products = (-self.slopes(examples)).astype(np.float32)
        made = Signature(bank, output_tokens(examples), products)
        return made if made.finite else empty_signature(bank, self._matrix.anchors)

    def slopes(self, examples: Sequence[Example], beyond: int | None = None) -> Vectors:
        """Return ⟨g, rowᵢ⟩ [N], the loss's slope along each row, at the common row plus the row of anchor `beyond`."""
        at = self._common if beyond is None else self._common + self._matrix.rows[beyond].float()
        lora = LoraWeights(self._layout.rank, self._a, cut_b(self._layout, at))
        gradient = b_gradient(self._model, self._layout, lora, examples)
        anchors = range(self._matrix.anchors)
        products = [torch.dot(gradient, self._matrix.rows[i].float()) for i in anchors]
        found: Vectors = torch.stack(products).double().numpy()
        return found


def pooled_examples(
    people: Sequence[History], task: Task, tokenizer: ChatTokenizer, options: BuildOptions
) -> list[Example]:
    """Return random items of random people, over which the curvature is measured."""
    chance, pairs = random.Random(options.seed), list[tuple[str, str]]()
    for person in chance.sample(list(people), len(people)):
        own = person.pairs(task)
        pairs += chance.sample(own, min(ITEMS_PER_PERSON, len(own)))
    return [encode_pair(tokenizer, *pair, options.max_tokens) for pair in pairs[:POOLED_ITEMS]]


def measure_curvature(
    signer: Signer, examples: Sequence[Example], anchors: int, work: Workbench, progress: RowProgress
) -> Vectors:
    """Measure Hᵢⱼ = ⟨rowᵢ, g(common + rowⱼ) − g(common)⟩ [N, N]; skip columns that an earlier run measured.

    The gradient is taken one whole row away from the common row, because users' steps are about that long.
    """
    here = work.vectors("slopes", lambda: signer.slopes(examples))
    progress.piece("measuring", 0, anchors)
    columns = []
    for anchor in range(anchors):
        columns.append(work.vectors(f"slopes-{anchor:02d}", partial(signer.slopes, examples, anchor)) - here)
        progress.piece("measuring", anchor + 1, anchors)
    return np.stack(columns, axis=1)
