"""Gradients at a bank's common row: users' signatures, and the constants that turn a signature into steps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from adapters.flat import cut_a, cut_b
from adapters.fusion import weighted_sum
from adapters.lora import LoraWeights
from adapters.matrix import MetaMatrix
from adapters.training.attached import attached
from adapters.training.example import Acts, Example, output_tokens
from adapters.training.forward.shared_part import SharedPart
from adapters.training.loss import b_gradient, drawn_gradients, example_losses, mean_loss, output_log_chances
from bank.building.resume import Workbench
from bank.building.rows import RowTrainer
from bank.building.selection import MIN_HELD_OUT, PEOPLE_PER_HELD_OUT
from bank.items.histories import History
from bank.items.profile import Vectors
from bank.items.prompt import encode_pair
from bank.lookup.signature import Curvature, Signature, empty_signature
from bank.manifest import PosteriorRule

MEASURED_ITEMS = 512  # number of items for the curvature, or four per anchor if that is more
FEWEST, MOST = 4, 16  # a person's newest items among them
DECAYS = (8.0, 25.0, 80.0, 250.0, 800.0, 2500.0, 8000.0, 25000.0)  # candidates
JUDGES = 24  # number of people whose later items choose the decay
_AT_A_TIME = 8  # gradients, and rows, that are multiplied at once


class Signer:
    """Computes gradients with respect to B at a bank's common row; FusionError without a common row or a shared A."""

    def __init__(self, model: Any, matrix: MetaMatrix, acts: Acts) -> None:
        self._model = model
        self._layout = matrix.layout
        self._rows = matrix.rows[: matrix.anchors]
        a = {name: a.float() for name, a in cut_a(matrix.layout, matrix.frozen).items()}
        self._common_b = matrix.rows[matrix.common_index].float()
        self._common = LoraWeights(matrix.layout.rank, a, cut_b(matrix.layout, self._common_b))
        self._shared = SharedPart(acts, self._common)

    def signature(self, bank: str, examples: Sequence[Example]) -> Signature:
        """Return the items' signature for `bank` (8 hex digits); empty if there are no items or it is not finite."""
        if not examples:
            return empty_signature(bank, len(self._rows))
        gradient = b_gradient(self._model, self._layout, self._common, examples, self._shared)
        made = Signature(bank, output_tokens(examples), self._products([gradient])[0].astype(np.float32))
        return made if made.finite else empty_signature(bank, len(self._rows))

    def drawn_products(self, examples: Sequence[Example], seed: int) -> Vectors:
        """Return −⟨g, rowᵢ⟩ of each example for an output that the model draws, [E, N], summed over its tokens."""
        gradients = drawn_gradients(self._model, self._layout, self._common, examples, seed, shared=self._shared)
        parts = [self._products(some) for some in iter(lambda: list(islice(gradients, _AT_A_TIME)), [])]
        return np.concatenate(parts)

    def losses(self, steps: Vectors, examples: Sequence[Example]) -> Vectors:
        """Return the examples' mean loss after each of the steps [S, N] from the common row, in nats per token."""
        return np.array([mean_loss(model, examples) for model in self._after(steps)])

    def token_losses(self, step: Vectors, examples: Sequence[Example]) -> list[Vectors]:
        """Return the loss of each output token of each example after a step [N] from the common row, in nats."""
        return [losses.numpy() for model in self._after(step[None]) for losses in example_losses(model, examples)]

    def log_chances(self, steps: Vectors, examples: Sequence[Example]) -> Iterator[Vectors]:
        """Yield each token's log-probability at each position of the outputs, [T, V], after each step of [S, N]."""
        for model in self._after(steps):
            yield output_log_chances(model, examples).numpy()

    def _after(self, steps: Vectors) -> Iterator[Any]:
        """Yield the model after each of the steps [S, N] from the common row."""
        with attached(self._model, self._common, shared=self._shared) as here:
            for step in steps.tolist():
                b = self._common_b + weighted_sum(self._rows, range(len(self._rows)), step, torch.float32)
                here.put(LoraWeights(self._layout.rank, self._common.a, cut_b(self._layout, b)))
                yield here.model

    def _products(self, gradients: Sequence[torch.Tensor]) -> Vectors:
        """Return −⟨g, rowᵢ⟩ of each gradient, [G, N]."""
        stacked = torch.stack(list(gradients))
        parts = [stacked @ rows.to(stacked.device).float().T for rows in torch.split(self._rows, _AT_A_TIME)]
        products: Vectors = torch.cat(parts, 1).double().cpu().numpy()
        return -products


@dataclass(frozen=True, slots=True)
class MeasuredPerson:
    """A person whose newest items, oldest first, measure the bank."""

    user_id: str
    own_row: int | None  # the anchor's index, if the person is an anchor
    examples: list[Example]

    @property
    def tokens(self) -> int:
        return sum(len(example.ids) for example in self.examples)

    @property
    def halves(self) -> tuple[list[Example], list[Example]]:
        """The earlier items and the later ones."""
        half = len(self.examples) // 2
        return self.examples[:half], self.examples[half:]


@dataclass(frozen=True, slots=True)
class MeasuredPeople:
    """Random people who measure the bank; if there are enough, the common row does not see the first of them."""

    people: Sequence[MeasuredPerson]
    unseen: Sequence[MeasuredPerson]

    @property
    def judges(self) -> Sequence[MeasuredPerson]:
        """Those whose later items choose the bank's constants."""
        return self.unseen or self.people


def measured_people(people: Sequence[History], anchors: Sequence[History], trainer: RowTrainer) -> MeasuredPeople:
    wanted, rows = max(MEASURED_ITEMS, 4 * len(anchors)), {person.user_id: i for i, person in enumerate(anchors)}
    measured = list[MeasuredPerson]()
    for person in random.Random(trainer.options.seed).sample(list(people), len(people)):
        if wanted <= 0:
            break
        pairs = person.pairs(trainer.task)[-MOST:]
        if len(pairs) >= FEWEST:
            examples = [encode_pair(trainer.tokenizer, *pair, trainer.options.max_tokens) for pair in pairs]
            measured.append(MeasuredPerson(person.user_id, rows.get(person.user_id), examples))
            wanted -= len(pairs)
    judges = min(JUDGES, len(people) // PEOPLE_PER_HELD_OUT, len(measured))
    return MeasuredPeople(measured, measured[:judges] if judges >= MIN_HELD_OUT else [])


def measure_curvature(
    signer: Signer, people: Sequence[MeasuredPerson], trainer: RowTrainer, work: Workbench
) -> Vectors:
    """Measure H [N, N]: the covariance of one token's products, for outputs that the model draws."""
    drawn = work.pieces(
        [f"drawn-{position:04d}" for position in range(len(people))],
        lambda position: signer.drawn_products(people[position].examples, seed=trainer.options.seed + position),
        lambda done: trainer.progress.piece("measuring the curvature", done, len(people)),
    )
    products = np.concatenate(drawn)
    return np.asarray(products.T @ products / sum(output_tokens(person.examples) for person in people))


def fit_rule(
    signer: Signer, curvature: Curvature, people: Sequence[MeasuredPerson], trainer: RowTrainer, work: Workbench
) -> tuple[float, Vectors]:
    """Return the decay whose steps from people's earlier items gain most on their later items, as measured.

    Also return the share of that gain that the 1, 2, … N leading directions keep, [N], as the products predict it. A
    person's own row is left out, since it was trained on these items. Without any other row nothing is fitted.
    """
    rows = len(curvature.eigenvalues)
    judges = judges_of(curvature, people)
    evenly = np.linspace(0, 1, rows + 1, dtype=np.float32)[1:]
    if not judges:
        return PosteriorRule().decay, evenly
    judged = work.pieces(
        [f"judge-{position:02d}" for position in range(len(judges))],
        lambda position: _judge(signer, curvature, judges[position], directions=trainer.options.wants_directions),
        lambda done: trainer.progress.piece("fitting the rule", done, len(judges)),
    )
    gains = np.mean(judged, axis=0)
    best = int(np.argmax(gains[:, 0]))
    spread = 1.96 * float(np.std([each[best, 0] for each in judged])) / max(1, len(judged) - 1) ** 0.5
    told = ", ".join(f"{gain:+.4f} at {decay:g}" for gain, decay in zip(gains[:, 0], DECAYS, strict=True))
    trainer.progress.say(
        f"gain on {len(judges)} people's later items by decay, in nats per token: {told}; the best ± {spread:.4f}"
    )
    if (by_count := gains[best, 1:]).size and by_count[-1] > 0:
        return DECAYS[best], np.asarray(by_count / by_count[-1], np.float32)
    return DECAYS[best], evenly


def judges_of(curvature: Curvature, people: Sequence[MeasuredPerson]) -> list[MeasuredPerson]:
    """Return the people whose later items choose a bank's constants: those with rows besides their own."""
    return [person for person in people if person.own_row is None or len(curvature.eigenvalues) > 1][:JUDGES]


def _judge(signer: Signer, curvature: Curvature, person: MeasuredPerson, *, directions: bool) -> Vectors:
    """Return each decay's gain on the person's later items, [decays, 1], in nats per token.

    With `directions`, [decays, 1 + N]: also the gain that the products predict for the 1, 2, … N leading directions.
    """
    own, (earlier, later) = person.own_row, person.halves
    seen = signer.signature("", earlier)
    steps = [curvature.step(seen, decay, own) for decay in DECAYS]
    losses = signer.losses(np.stack([np.zeros_like(steps[0]), *steps]), later)
    gained: Vectors = (losses[0] - losses[1:])[:, None]
    if not directions:
        return gained
    wanted = signer.signature("", later)
    return np.concatenate([gained, np.stack([curvature.gains(step, wanted, own) for step in steps])], axis=1)
