"""What the rules of weights have to know of a bank, measured once, when it is built.

For shares: predicted gains are calibrated against measured ones, on people who are not anchors. A gradient is right
about small steps, but an anchor is a large one: its help or harm is predicted too large, and an anchor far from the
mean harms nearly everybody. One slope for all anchors and one offset per anchor correct that; without the offsets the
most extreme anchors win.

For the posterior: how sharply the loss bends along the anchors' rows. The gradient is taken at the common row and a
whole row beyond it, over pooled items, for a user's step is about that long.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from adapters.training.example import Example
from bank.building.resume import Workbench
from bank.errors import BankError
from bank.items.histories import History
from bank.items.profile import Vectors
from bank.items.prompt import ChatTokenizer, encode_pair
from bank.items.tasks import Task

if TYPE_CHECKING:
    from bank.building.signer import Signer

MAX_DRAWS = 32
DRAWS_OF_ONE = 4
"""Draws from one person's items."""

DRAWN_ITEMS = 10
"""Items of one draw: about what a new user brings."""

MIN_PEOPLE = 2

POOLED_ITEMS, POOLED_OF_ONE = 64, 2
"""Items that the curvature is measured on, and how many of them one person may give."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """gainᵢ ≈ a·x - cᵢ, where x is the inner product; gains are in nats a token against the centre.

    Attributes:
        slope: a.
        offsets: c, [N] float32.
        correlation: of predicted with measured gains over anchors, mean of all draws.
        draws: how many there were.
    """

    slope: float
    offsets: Vectors
    correlation: float
    draws: int

    def record(self) -> dict[str, float | int]:
        """Its entries in the manifest's `training`."""
        return {
            "signature_slope": self.slope,
            "signature_correlation": self.correlation,
            "signature_draws": self.draws,
        }


def check_enough(people: int) -> None:
    """Refuse to calibrate on so few people.

    Raises:
        BankError: when they are fewer than `MIN_PEOPLE`.
    """
    if people < MIN_PEOPLE:
        raise BankError(
            f"signatures need {MIN_PEOPLE} people or more who are not anchors to be calibrated on, got {people}: ask "
            "for fewer --anchors, give more people, or build with --weights topic"
        )


def calibrate_signer(
    signer: Signer,
    people: Sequence[History],
    task: Task,
    tokenizer: ChatTokenizer,
    work: Workbench,
    *,
    max_tokens: int,
    seed: int,
    on_draw: Callable[[int, int], None] = lambda done, of: None,
) -> Calibration:
    """Predict and measure each anchor's gain on several draws of items; finished draws are not repeated.

    Args:
        signer: the bank's.
        people: candidates who are not anchors, at least `MIN_PEOPLE`.
        task, tokenizer, max_tokens: how items become examples.
        work: where draws are kept.
        seed: of the draws.
        on_draw: told how many draws are done and how many there are, before the first new one and after each.

    Raises:
        BankError: when there are too few people.
    """
    check_enough(len(people))
    chance = random.Random(seed)
    order = chance.sample(range(len(people)), len(people))
    draws: list[Vectors] = []
    names = [f"draw-{draw:02d}" for draw in range(min(MAX_DRAWS, DRAWS_OF_ONE * len(people)))]
    ready = sum(work.has_vectors(name) for name in names)
    on_draw(ready, len(names))
    for draw, name in enumerate(names):
        pairs = people[order[draw % len(people)]].pairs(task)
        drawn = random.Random(f"{seed}:{draw}").sample(pairs, min(DRAWN_ITEMS, len(pairs)))
        examples = [encode_pair(tokenizer, *pair, max_tokens) for pair in drawn]

        def measure(examples: Sequence[Example] = examples) -> Vectors:
            return np.stack([signer.products(examples), signer.measured_gains(examples)])

        draws.append(work.vectors(name, measure))
        if draw >= ready:
            on_draw(draw + 1, len(names))
    predicted, measured = np.stack(draws).transpose(1, 0, 2)
    return calibrate(predicted, measured)


def measure_curvature(
    signer: Signer,
    people: Sequence[History],
    task: Task,
    tokenizer: ChatTokenizer,
    work: Workbench,
    *,
    anchors: int,
    max_tokens: int,
    seed: int,
    on_anchor: Callable[[int, int], None] = lambda done, of: None,
) -> Vectors:
    """Hᵢⱼ = ⟨rowᵢ, g(common + rowⱼ) − g(common)⟩, [N, N]; finished columns are not measured again.

    Args:
        signer: the bank's, at the common row.
        people: everybody whose items may be used.
        task, tokenizer, max_tokens: how items become examples.
        work: where columns are kept.
        anchors: N.
        seed: of the choice of items.
        on_anchor: told how many columns are done and how many there are.
    """
    chance = random.Random(seed)
    pooled = []
    for person in chance.sample(list(people), len(people)):
        pairs = person.pairs(task)
        pooled += chance.sample(pairs, min(POOLED_OF_ONE, len(pairs)))
    examples = [encode_pair(tokenizer, *pair, max_tokens) for pair in pooled[:POOLED_ITEMS]]
    here = work.vectors("slopes", lambda: signer.slopes(examples))
    columns = []
    for anchor in range(anchors):
        on_anchor(anchor, anchors)
        there = work.vectors(f"slopes-{anchor:02d}", partial(signer.slopes, examples, anchor))
        columns.append(there - here)
    on_anchor(anchors, anchors)
    return np.stack(columns, axis=1)


def calibrate(predicted: Vectors, measured: Vectors) -> Calibration:
    """Least squares with one slope and an offset for each anchor.

    Args:
        predicted: inner products, [draws, N]; positive is better.
        measured: by how much each anchor lowered the loss, [draws, N].
    """
    x, y = predicted.astype(np.float64), measured.astype(np.float64)
    x_mean, y_mean = x.mean(0), y.mean(0)
    spread = ((x - x_mean) ** 2).sum()
    slope = float(((x - x_mean) * (y - y_mean)).sum() / spread) if spread > 0 else 0.0
    slope = max(slope, 0.0)  # evidence that contradicts itself counts for nothing
    offsets = slope * x_mean - y_mean
    fitted = slope * x - offsets
    correlations = [np.corrcoef(a, b)[0, 1] for a, b in zip(fitted, y, strict=True) if a.std() > 0 and b.std() > 0]
    mean = float(np.mean(correlations)) if correlations else 0.0
    return Calibration(slope, offsets.astype(np.float32), mean, len(x))
