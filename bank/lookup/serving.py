"""All that the gateway needs from a bank: its manifest, its index, and the way from an embedding to a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adapters.recipe import FusionRecipe
from bank.errors import BankError
from bank.items.profile import Vectors
from bank.items.tasks import Task, get_task
from bank.lookup.atlas import Atlas
from bank.lookup.index import AnchorIndex
from bank.lookup.signature import Curvature, Signature
from bank.lookup.weights import (
    TOPIC_GRAIN,
    AnchorWeight,
    posterior_weights,
    recipe_of_shares,
    recipe_of_steps,
    topic_weights,
)
from bank.manifest import CURVATURE_FILE, INDEX_FILE, MAP_FILE, BankManifest, read_manifest, verify_files


@dataclass(frozen=True, slots=True)
class UserRecipe:
    """A user's recipe, the anchors behind it, and the evidence that it comes from, `topic` or `signature`."""

    recipe: FusionRecipe
    weights: tuple[AnchorWeight, ...]
    source: str


class ServingBank:
    """A bank opened for lookups; the weights of its adapters are never read here."""

    def __init__(
        self, manifest: BankManifest, index: AnchorIndex, atlas: Atlas, curvature: Curvature | None = None
    ) -> None:
        self.manifest = manifest
        self.task: Task = get_task(manifest.task)
        self.index = index
        self.atlas = atlas
        self.curvature = curvature

    @classmethod
    def open(cls, folder: Path, embedder_id: str) -> ServingBank:
        """Open the bank in `folder`, for profiles whose vectors the embedder with this id makes.

        Raises:
            BankError: when the bank is missing, damaged, or made with another embedder.
        """
        manifest = read_manifest(folder)
        verify_files(folder, manifest, (INDEX_FILE, MAP_FILE, *([CURVATURE_FILE] * manifest.signs)))
        if manifest.embedder.id != embedder_id:
            raise BankError(
                f"the bank at {folder} was made with embedder {manifest.embedder.id}, but this one is {embedder_id}: "
                "their vectors cannot be compared. Set MTA_EMBEDDER to the bank's embedder or build the bank again"
            )
        index = AnchorIndex.load(folder / INDEX_FILE)
        if (index.anchors, index.dim) != (len(manifest.anchors), manifest.embedder.dim):
            raise BankError(
                f"the index of the bank at {folder} holds {index.anchors} anchors of {index.dim} numbers, but "
                f"its manifest says {len(manifest.anchors)} of {manifest.embedder.dim}: build the bank again"
            )
        atlas = Atlas.load(folder / MAP_FILE, index.anchors, index.dim)
        return cls(manifest, index, atlas, Curvature.load(folder / CURVATURE_FILE) if manifest.signs else None)

    @property
    def signs(self) -> bool:
        """Whether signatures speak for users of this bank."""
        return self.manifest.signs

    def personalise(self, embedding: Vectors, signature: Signature | None = None, share: float = 1.0) -> UserRecipe:
        """The recipe for a user, and the anchors behind it, the strongest evidence first.

        The embedding [E] is the profile's, at unit length. A signature of another bank, or with a number that is not
        finite, says nothing. The anchors get a share, 0 to 1, of their weights.
        """
        rule = self.manifest.weights
        if rule.posterior and self.curvature and signature and _says_something(signature, self.manifest.short):
            weights = posterior_weights(self.index, rule.posterior, self.curvature, embedding, signature)
            return UserRecipe(recipe_of_steps(self.manifest, weights, share), weights, "signature")
        weights = topic_weights(self.index, rule, embedding)
        return UserRecipe(recipe_of_shares(self.manifest, weights, share, TOPIC_GRAIN), weights, "topic")


def _says_something(signature: Signature, bank: str) -> bool:
    return signature.tokens > 0 and signature.bank == bank and bool(np.isfinite(signature.products).all())
