"""A bank opened in a gateway: turn a profile into weights, by topics or by signature, and into a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters.recipe import MAX_WEIGHT, PER_MILLE, FusionRecipe, Term, per_mille
from bank.errors import BankError
from bank.items.profile import Vectors
from bank.items.tasks import Task, get_task
from bank.lookup.directions import Directions, recipe_of_directions
from bank.lookup.index import AnchorIndex
from bank.lookup.projection import Projection
from bank.lookup.signature import Curvature, Signature
from bank.manifest import (
    COORDINATES_FILE,
    CURVATURE_FILE,
    INDEX_FILE,
    MAP_FILE,
    BankManifest,
    WeightRule,
    read_manifest,
    verify_files,
)

# Rounding step of topic weights, in per mille, so that similar users share a recipe and its slot: with 12 anchors, 117
# authors had 25 recipes, and 88 with a step of 1. The loss of 17 people's mails changed by 0.0000 ± 0.0006 nats.
TOPIC_GRAIN = 50


@dataclass(slots=True, frozen=True)
class AnchorWeight:
    """One anchor's weight before rounding; in a bank of directions, one of the anchors nearest to the user."""

    anchor: int  # index in the bank
    weight: float  # by topics: a share of the rule's strength; by signature: a step along the row; 0 if only near
    similarity: float  # -1 to 1: cosine of topics; with directions and a signature, of the changes of the loss
    gain: float | None = None  # first-order gain on the user's own items, in nats per token; None by topics


@dataclass(frozen=True, slots=True)
class UserRecipe:
    """A user's recipe, its anchors' weights, and the source of the weights, `topic` or `signature`."""

    recipe: FusionRecipe
    weights: tuple[AnchorWeight, ...]
    source: str


@dataclass(slots=True, eq=False)
class ServingBank:
    """A bank opened for lookups, without the weights of its adapters."""

    manifest: BankManifest
    task: Task
    index: AnchorIndex
    projection: Projection
    curvature: Curvature | None = None
    directions: Directions | None = None

    @classmethod
    def open(cls, folder: Path, embedder_id: str) -> ServingBank:
        """Open the bank in `folder`; BankError if it is damaged or was built with a different embedder."""
        manifest = read_manifest(folder)
        files = [INDEX_FILE, MAP_FILE, *[CURVATURE_FILE] * manifest.has_signatures]
        files += [COORDINATES_FILE] if manifest.directions else []
        verify_files(folder, manifest, tuple(files))
        if manifest.embedder.id != embedder_id:
            raise BankError(
                f"the bank at {folder} was made with embedder {manifest.embedder.id}, but this one is {embedder_id}: "
                "their vectors are not comparable. Set MTA_EMBEDDER to the bank's embedder or build the bank again"
            )
        index = AnchorIndex.load(folder / INDEX_FILE)
        if (index.anchor_count, index.dim) != (len(manifest.anchors), manifest.embedder.dim):
            raise BankError(
                f"the index of the bank at {folder} holds {index.anchor_count} anchors of {index.dim} dimensions, but "
                f"its manifest says {len(manifest.anchors)} of {manifest.embedder.dim}: build the bank again"
            )
        projection = Projection.load(folder / MAP_FILE, index.anchor_count, index.dim)
        curvature = Curvature.load(folder / CURVATURE_FILE) if manifest.has_signatures else None
        directions = None
        if manifest.directions and curvature:
            directions = Directions.load(folder / COORDINATES_FILE, manifest, curvature)
        return cls(manifest, get_task(manifest.task), index, projection, curvature, directions)

    def personalise(self, embedding: Vectors, signature: Signature | None = None, scale: float = 1.0) -> UserRecipe:
        """Return a user's recipe, and its anchors with the strongest evidence first.

        The embedding [E] has unit length; without topics it is 0, and its recipe the common row. An unusable signature
        is ignored. Weights are multiplied by `scale`, 0 to 1.
        """
        rule, curvature = self.manifest.weights, self.curvature
        weights = topic_weights(self.index, rule, embedding)
        if rule.posterior and curvature and signature and signature.is_usable_for(self.manifest.short):
            topics = step_of(weights, self.index.anchor_count)
            if self.directions:
                steps = curvature.step(signature, rule.posterior.decay, topics=topics @ self.directions.coordinates)
                near = tuple(AnchorWeight(anchor, 0.0, cosine) for anchor, cosine in self.directions.nearest(steps))
                return UserRecipe(recipe_of_directions(self.manifest, steps, scale), near, "signature")
            steps = curvature.step(signature, rule.posterior.decay, topics=topics)
            weights = posterior_weights(self.index, steps, embedding, signature)
            return UserRecipe(recipe_of_steps(self.manifest, weights, scale), weights, "signature")
        return UserRecipe(self.merge(weights, scale * bool(embedding.any()), TOPIC_GRAIN), weights, "topic")

    def merge(self, weights: Sequence[AnchorWeight], scale: float = 1.0, grain: int = 1) -> FusionRecipe:
        """Return the recipe of anchors with non-negative weights, rounded as by `recipe_of_shares`."""
        recipe = recipe_of_shares(self.manifest, weights, scale, grain)
        if not self.directions or not recipe.terms:
            return recipe
        rows = [term.weight / PER_MILLE * self.directions.coordinates[term.anchor] for term in recipe.terms]
        return recipe_of_directions(self.manifest, np.sum(rows, axis=0))


def topic_weights(index: AnchorIndex, rule: WeightRule, embedding: Vectors) -> tuple[AnchorWeight, ...]:
    """Return the K nearest anchors, nearest first, weighted by cosine if positive; equally if none is positive."""
    nearest = index.search(embedding, rule.anchors)
    evidence = [max(similarity, 0.0) for _, similarity in nearest]
    if not any(evidence):
        evidence = [1.0] * len(nearest)
    scale = rule.strength / sum(evidence)
    return tuple(
        AnchorWeight(anchor, part * scale, similarity)
        for (anchor, similarity), part in zip(nearest, evidence, strict=True)
    )


def step_of(weights: Sequence[AnchorWeight], anchors: int) -> Vectors:
    """Return the weights by topic as a step along all anchors' rows, [N]; 0 where no anchor's topics are the user's."""
    step = np.zeros(anchors, np.float32)
    near = [each for each in weights if each.similarity > 0]
    step[[each.anchor for each in near]] = [each.weight for each in near]
    return step


def posterior_weights(
    index: AnchorIndex, steps: Vectors, embedding: Vectors, signature: Signature
) -> tuple[AnchorWeight, ...]:
    """Return steps [N] from the common row as weights, longest first; the embedding [E] only sets the similarities."""
    cosines = index.vectors(range(index.anchor_count)) @ np.asarray(embedding, np.float32)
    longest = sorted(range(index.anchor_count), key=lambda anchor: (-abs(steps[anchor]), anchor))
    return tuple(
        AnchorWeight(anchor, float(steps[anchor]), float(cosines[anchor]), float(signature.products[anchor]))
        for anchor in longest
    )


def recipe_of_steps(manifest: BankManifest, weights: Sequence[AnchorWeight], scale: float = 1.0) -> FusionRecipe:
    """Multiply each step by `scale`, 0 to 1, and round it to per mille; drop steps that round to zero."""
    steps = {w.anchor: round(scale * w.weight * PER_MILLE) for w in sorted(weights, key=lambda w: w.anchor)}
    terms = tuple(Term(anchor, max(-MAX_WEIGHT, min(MAX_WEIGHT, step))) for anchor, step in steps.items() if step)
    return FusionRecipe(manifest.short, manifest.method, True, terms)


def recipe_of_shares(
    manifest: BankManifest, weights: Sequence[AnchorWeight], scale: float = 1.0, grain: int = 1
) -> FusionRecipe:
    """Round non-negative weights to multiples of `grain` per mille that keep their sum; drop weights of zero.

    The sum is multiplied by `scale`, 0 to 1. Without a common row to take the rest, it is always 1000.
    """
    total = round(scale * sum(w.weight for w in weights) * PER_MILLE) if manifest.common else PER_MILLE
    ordered = sorted(weights, key=lambda w: w.anchor)
    rounded = per_mille([w.weight for w in ordered], total, grain)
    terms = tuple(Term(w.anchor, mille) for w, mille in zip(ordered, rounded, strict=True) if mille)
    return FusionRecipe(manifest.short, manifest.method, manifest.common, terms)
