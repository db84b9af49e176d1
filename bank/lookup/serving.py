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
from bank.lookup.posterior import Curvature
from bank.lookup.signature import Signature
from bank.lookup.weights import (
    TOPIC_GRAIN,
    AnchorWeight,
    make_recipe,
    posterior_weights,
    signature_weights,
    topic_weights,
)
from bank.manifest import CURVATURE_FILE, INDEX_FILE, MAP_FILE, BankManifest, read_manifest, verify_files


@dataclass(frozen=True, slots=True)
class UserRecipe:
    """A user's recipe, and where it comes from.

    Attributes:
        recipe: what is fused.
        weights: the anchors behind it.
        source: `topic` or `signature`.
    """

    recipe: FusionRecipe
    weights: tuple[AnchorWeight, ...]
    source: str


class ServingBank:
    """A bank opened for lookups; the weights of its adapters are never read here."""

    def __init__(
        self,
        manifest: BankManifest,
        index: AnchorIndex,
        curvature: Curvature | None = None,
        atlas: Atlas | None = None,
    ) -> None:
        self.manifest = manifest
        self.atlas = atlas
        self.task: Task = get_task(manifest.task)
        self.index = index
        self.curvature = curvature

    @classmethod
    def open(cls, folder: Path, embedder_id: str) -> ServingBank:
        """Open the bank in `folder`.

        Args:
            folder: written by `mta bank build` or `mta bank import`.
            embedder_id: the id of the embedder that will make the profiles' vectors.

        Raises:
            BankError: when the bank is missing, damaged, or made with another embedder.
        """
        manifest = read_manifest(folder)
        mapped, signed = MAP_FILE in manifest.files, manifest.signed
        verify_files(folder, manifest, (INDEX_FILE, *([CURVATURE_FILE] * signed), *([MAP_FILE] * mapped)))
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
        curvature = Curvature.load(folder / CURVATURE_FILE) if signed else None
        atlas = Atlas.load(folder / MAP_FILE, index.anchors, index.dim) if mapped else None
        return cls(manifest, index, curvature, atlas)

    @property
    def signs(self) -> bool:
        """Whether signatures speak for users of this bank."""
        return self.manifest.weights.source == "signature"

    def personalise(self, embedding: Vectors, signature: Signature | None = None, share: float = 1.0) -> UserRecipe:
        """The recipe for a user, and the anchors behind it, the strongest evidence first.

        Args:
            embedding: the profile's [E], at unit length.
            signature: the user's; one of another bank, or with a number that is not finite, says nothing.
            share: how much of the rule's strength the recipe's anchors get, as in `make_recipe`.
        """
        rule = self.manifest.weights
        if not (self.signs and signature and _says_something(signature, self.manifest.short)):
            weights = topic_weights(self.index, rule, embedding)
            return UserRecipe(make_recipe(self.manifest, weights, share, TOPIC_GRAIN), weights, "topic")
        if rule.posterior and self.curvature:
            weights = posterior_weights(self.index, rule.posterior, self.curvature, embedding, signature)
        else:
            assert rule.signature
            weights = signature_weights(self.index, rule.signature, embedding, signature)
        return UserRecipe(make_recipe(self.manifest, weights, share), weights, "signature")


def _says_something(signature: Signature, bank: str) -> bool:
    return signature.tokens > 0 and signature.bank == bank and bool(np.isfinite(signature.products).all())
