"""The seam between a user and a recipe: which anchors speak for the user, and how loudly.

A `WeightSource` is one kind of evidence. `TopicWeights` is the first, the paper's own (arXiv 2511.20072):
the anchors nearest to the profile's text embedding, weighted by their similarities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from adapters.recipe import PER_MILLE, FusionRecipe, Term, per_mille
from bank.index import AnchorIndex
from bank.manifest import BankManifest, WeightRule
from bank.profile import Vectors


@dataclass(slots=True, frozen=True)
class AnchorWeight:
    """One anchor's say.

    Attributes:
        anchor: its index in the bank.
        weight: its share before rounding; all shares of a user sum to the rule's strength.
        similarity: its evidence, -1 to 1 for the cosine of topics.
    """

    anchor: int
    weight: float
    similarity: float


class WeightSource(Protocol):
    """Evidence about a user, as anchors with weights."""

    def weights(self, embedding: Vectors) -> tuple[AnchorWeight, ...]:
        """The anchors that speak for the user, the nearest first.

        Args:
            embedding: the user's [E], at unit length.
        """


class TopicWeights:
    """Similarity of topics: the k nearest anchors, each weighted by its cosine over their sum.

    A negative cosine counts as 0; when all do, the weights are equal. The nearest anchor never weighs less than one
    that is farther away.
    """

    def __init__(self, index: AnchorIndex, rule: WeightRule) -> None:
        self._index = index
        self._rule = rule

    def weights(self, embedding: Vectors) -> tuple[AnchorWeight, ...]:
        found = self._index.search(embedding, self._rule.anchors)
        evidence = [max(similarity, 0.0) for _, similarity in found]
        if not any(evidence):
            evidence = [1.0] * len(found)
        scale = self._rule.strength / sum(evidence)
        return tuple(
            AnchorWeight(anchor, share * scale, similarity)
            for (anchor, similarity), share in zip(found, evidence, strict=True)
        )


def make_recipe(manifest: BankManifest, weights: Sequence[AnchorWeight]) -> FusionRecipe:
    """Round weights to a canonical recipe of this bank. Anchors that round to nothing are left out.

    Args:
        manifest: the bank.
        weights: non-negative, each anchor once; only their proportions count, the sum is the rule's strength.
    """
    total = round(manifest.weights.strength * PER_MILLE) if manifest.common else PER_MILLE
    ordered = sorted(weights, key=lambda w: w.anchor)
    rounded = per_mille([w.weight for w in ordered], total)
    terms = tuple(Term(w.anchor, mille) for w, mille in zip(ordered, rounded, strict=True) if mille)
    return FusionRecipe(manifest.short, manifest.method, manifest.common, terms)
