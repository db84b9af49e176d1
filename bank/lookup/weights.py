"""From a user to weights: which anchors speak for the user, and how loudly.

Two kinds of evidence. *Topic* is the paper's own (arXiv 2511.20072): the anchors nearest to the profile's text
embedding, weighted by their similarities. *Signature* asks how well each anchor explains the user's own answers
(`bank/lookup/signature.py`), and lets the topic have a say beside it. A user without a signature is served by topic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapters.recipe import MAX_STEP, MAX_TERMS, PER_MILLE, FusionRecipe, Term, per_mille
from bank.items.profile import Vectors
from bank.lookup.index import AnchorIndex
from bank.lookup.posterior import Curvature
from bank.lookup.signature import Signature, predicted_gains
from bank.manifest import BankManifest
from bank.rules import PosteriorRule, SignatureRule, WeightRule

TOPIC_GRAIN = 50
"""Weights by topic are multiples of so many per mille: people who are alike then have one recipe, and share its slot.

Of 117 authors 88 had a recipe of their own kind by the per mille, and 25 by this (12 anchors, two a recipe); over the
mails of 17 people it moved the loss by 0.0000 nats a token, 95 % interval -0.0006 to 0.0006.
"""


@dataclass(slots=True, frozen=True)
class AnchorWeight:
    """One anchor's say.

    Attributes:
        anchor: its index in the bank.
        weight: its share before rounding; all shares of a user sum to the rule's strength. By the posterior, the step
            along its row, which may be negative.
        similarity: the cosine of topics, -1 to 1.
        gain: by how many nats a token it is predicted to lower the loss of the user's own items, against the bank's
            centre; None where only topics were compared.
    """

    anchor: int
    weight: float
    similarity: float
    gain: float | None = None


def topic_weights(index: AnchorIndex, rule: WeightRule, embedding: Vectors) -> tuple[AnchorWeight, ...]:
    """Similarity of topics: the K nearest anchors, nearest first, each weighted by its cosine over their sum.

    A negative cosine counts as 0; when all do, the weights are equal. The nearest anchor never weighs less than one
    that is farther away.

    Args:
        index: of the anchors' embeddings.
        rule: K and strength.
        embedding: the user's [E], at unit length.
    """
    found = index.search(embedding, rule.anchors)
    evidence = [max(similarity, 0.0) for _, similarity in found]
    if not any(evidence):
        evidence = [1.0] * len(found)
    scale = rule.strength / sum(evidence)
    return tuple(
        AnchorWeight(anchor, share * scale, similarity)
        for (anchor, similarity), share in zip(found, evidence, strict=True)
    )


def signature_weights(
    index: AnchorIndex, rule: SignatureRule, embedding: Vectors, signature: Signature
) -> tuple[AnchorWeight, ...]:
    """Evidence from the user's own items, the most convincing anchors first.

    Args:
        index: of the anchors' embeddings.
        rule: K, strength, τ and κ, a and c.
        embedding: the user's [E], at unit length.
        signature: the user's, of this bank.
    """
    anchors = range(index.anchors)
    gains = predicted_gains(signature, rule.slope, np.asarray(rule.offsets, np.float32))
    cosines = index.vectors(anchors) @ np.asarray(embedding, np.float32)
    return evident_weights(rule, anchors, gains, cosines, signature.tokens)


def evident_weights(
    rule: SignatureRule, anchors: Sequence[int], gains: Vectors, cosines: Vectors, tokens: int
) -> tuple[AnchorWeight, ...]:
    """strength × softmax(τ·√n·gain + κ·cosine) over the best K anchors.

    Args:
        rule: K, strength, τ and κ.
        anchors: their indices.
        gains: nats a token by which each lowers the loss of the user's items, predicted or measured.
        cosines: similarity of topics.
        tokens: n, output tokens of those items.
    """
    evidence = tokens**0.5 * np.asarray(gains, np.float64)
    scores = rule.tau * evidence + rule.kappa * np.asarray(cosines, np.float64)
    best = sorted(range(len(anchors)), key=lambda place: (-scores[place], anchors[place]))[: rule.anchors]
    shares = np.exp(scores[best] - scores[best[0]])
    shares *= rule.strength / shares.sum()
    return tuple(
        AnchorWeight(anchors[place], float(share), float(cosines[place]), float(gains[place]))
        for place, share in zip(best, shares, strict=True)
    )


def posterior_weights(
    index: AnchorIndex, rule: PosteriorRule, curvature: Curvature, embedding: Vectors, signature: Signature
) -> tuple[AnchorWeight, ...]:
    """Steps from the common row, the longest first.

    Args:
        index: of the anchors' embeddings.
        rule: K and λ.
        curvature: the bank's.
        embedding: the user's [E], at unit length.
        signature: the user's, of this bank, taken at the common row.
    """
    steps = curvature.step(signature.products, signature.tokens, rule.decay)
    cosines = index.vectors(range(index.anchors)) @ np.asarray(embedding, np.float32)
    most = min(rule.anchors, MAX_TERMS)
    longest = sorted(range(index.anchors), key=lambda place: (-abs(steps[place]), place))[:most]
    return tuple(
        AnchorWeight(place, float(steps[place]), float(cosines[place]), float(signature.products[place]))
        for place in longest
    )


def common_recipe(manifest: BankManifest) -> FusionRecipe:
    """The recipe of the bank's common row alone, in the format that its engines take."""
    return FusionRecipe(manifest.short, manifest.method, True, (), signed=manifest.signed)


def make_recipe(
    manifest: BankManifest, weights: Sequence[AnchorWeight], share: float = 1.0, grain: int = 1
) -> FusionRecipe:
    """Round weights to a canonical recipe of this bank. Anchors that round to nothing are left out.

    Args:
        manifest: the bank.
        weights: each anchor once. What non-negative ones sum to is their strength beside the common row.
        share: how much of that strength, or of those steps, they get, 0 to 1; without a common row, which would take
            the rest, they get all of it.
        grain: what they are multiples of, in per mille; steps are not.
    """
    if manifest.signed:
        steps = {w.anchor: round(share * w.weight * PER_MILLE) for w in sorted(weights, key=lambda w: w.anchor)}
        bounded = {anchor: max(-MAX_STEP, min(MAX_STEP, step)) for anchor, step in steps.items()}
        terms = tuple(Term(anchor, step) for anchor, step in bounded.items() if step)
        return FusionRecipe(manifest.short, manifest.method, True, terms, signed=True)
    total = round(share * sum(w.weight for w in weights) * PER_MILLE) if manifest.common else PER_MILLE
    ordered = sorted(weights, key=lambda w: w.anchor)
    rounded = per_mille([w.weight for w in ordered], total, grain)
    terms = tuple(Term(w.anchor, mille) for w, mille in zip(ordered, rounded, strict=True) if mille)
    return FusionRecipe(manifest.short, manifest.method, manifest.common, terms)
