"""The banks an engine serves: the current one and, while a fleet moves to the next, that one too."""

from __future__ import annotations

from collections.abc import Mapping

from adapters.errors import FusionError, excerpt
from adapters.matrix import MetaMatrix
from adapters.recipe import FusionRecipe, parse_recipe
from bank.manifest import BankManifest, read_manifest
from bank.matrix import open_matrix
from server.settings import Settings

Manifests = Mapping[str, BankManifest]
"""Banks by the 8 hex digits that recipes carry."""


def read_manifests(settings: Settings) -> Manifests:
    """Read the manifest of every bank the settings name; BankError when one is missing or damaged."""
    manifests = [read_manifest(folder) for folder in settings.banks]
    return {manifest.short: manifest for manifest in manifests}


def open_matrices(settings: Settings) -> Mapping[str, MetaMatrix]:
    """Verify and map the meta-LoRA matrix of every bank, before a worker serves; BankError when one is damaged."""
    manifests = [(folder, read_manifest(folder)) for folder in settings.banks]
    return {manifest.short: open_matrix(folder, manifest) for folder, manifest in manifests}


def checked_recipe(name: str, manifests: Manifests) -> FusionRecipe:
    """Parse a recipe and make sure that fusing it cannot fail, apart from its user adapter.

    Raises:
        RecipeError: when the name is not canonical.
        FusionError: when it names a bank that is not served here, or something that its bank does not have.
    """
    recipe = parse_recipe(name)
    manifest = manifests.get(recipe.bank)
    if manifest is None:
        raise FusionError(f"recipe {excerpt(name)} is for bank {recipe.bank}; this engine has {sorted(manifests)}")
    manifest.check(recipe)
    return recipe
