"""The subject of a benchmark: a base model and its bank, from the settings or random."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from adapters.errors import MtaError
from adapters.recipe import STEPS_PER_DEVIATION, FusionRecipe, Term, per_mille
from bank.items.profile import Vectors
from bank.manifest import BankManifest, read_manifest
from bank.models.folders import base_model_id, ensure_base_model, ensure_embedder
from bench.rig.tiny import tiny_bank, tiny_model
from server.settings import load_settings

BankOption = Annotated[Path | None, typer.Option(help="The bank.", show_default="MTA_BANK")]
ModelOption = Annotated[
    str | None, typer.Option(help="Base model: folder, hub id or `default`.", show_default="MTA_MODEL")
]
TinyOption = Annotated[bool, typer.Option("--tiny", help="Use a tiny random model and bank, to test the benchmark.")]
TINY_CONTEXT = 2048
MAX_REPEATS = 10_000
"""Number of repeated recipes in a row after which the bank counts as exhausted."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A bank and its base model, on disk."""

    bank: Path
    model: Path
    manifest: BankManifest

    @property
    def title(self) -> str:
        """The description of model and bank for the titles of tables."""
        bank = self.manifest
        return f"{bank.base_model.name}, {bank.method.value}, rank {bank.rank} in slots of {bank.serving_rank}"

    @property
    def merged_rows(self) -> int:
        """Number of personal rows in a recipe: of the posterior if the bank has one, otherwise by topic."""
        weights, rows = self.manifest.weights, self.manifest.personal_rows
        return rows if weights.posterior else min(weights.anchors, rows)

    def recipes(self, seed: int = 0) -> Iterator[FusionRecipe]:
        """Yield distinct recipes with the bank's number of rows, in a seeded order.

        Raises:
            MtaError: if the bank has no more.
        """
        generator, seen, manifest, tries = random.Random(seed), set(), self.manifest, 0
        total = round(1000 * manifest.weights.strength)
        while (tries := tries + 1) < MAX_REPEATS:
            rows = sorted(generator.sample(range(manifest.personal_rows), self.merged_rows))
            if manifest.has_signatures:
                most = 3 * STEPS_PER_DEVIATION if manifest.directions else 500
                weights = [generator.choice((-1, 1)) * generator.randint(most // 20, most) for _ in rows]
            else:
                weights = per_mille([generator.uniform(0.2, 1) for _ in rows], total)
            terms = tuple(Term(a, w) for a, w in zip(rows, weights, strict=True))
            recipe = FusionRecipe(manifest.short, manifest.method, manifest.common, terms)
            if manifest.directions:
                recipe = replace(recipe, terms=(), steps=tuple(weights))
            if recipe not in seen:
                seen.add(recipe)
                tries = 0
                yield recipe
        raise MtaError(f"the bank at {self.bank} makes only {len(seen)} recipes: use one with more anchors")

    def names(self, count: int, seed: int = 0) -> list[str]:
        """Return the names of `count` distinct recipes."""
        return [recipe.name for recipe in itertools.islice(self.recipes(seed), count)]


def configured_subject(bank: Path | None, model: str | None) -> Subject:
    """Open the bank and the model that the options or the settings name.

    Raises:
        MtaError: if no bank was named, or the bank or the model does not exist.
    """
    settings = load_settings(bank=bank, model=model)
    folder = settings.bank_folder()
    manifest = read_manifest(folder)
    return Subject(folder, ensure_base_model(settings.model, settings.cache_dir, manifest.base_model), manifest)


def tiny(scratch: Path, *, anchors: int = 16, embeddings: Vectors | None = None) -> Subject:
    """Create a tiny random model with a random bank; `embeddings` [N, E] are those of its anchors."""
    model = tiny_model(scratch / "tiny", context=TINY_CONTEXT)
    return random_rows(scratch / "tiny-bank", model, "tiny", anchors=anchors, rank=4, embeddings=embeddings)


def random_subject(
    scratch: Path, model: str | None, rank: int = 8, *, anchors: int = 16, directions: int | None = None
) -> Subject:
    """Create a bank of random rows, or directions, for a base model, without room for user adapters."""
    settings = load_settings(model=model)
    folder = ensure_base_model(settings.model, settings.cache_dir)
    name, where = base_model_id(settings.model, folder).name, scratch / f"rank-{rank}"
    return random_rows(where, folder, name, anchors=directions or anchors, rank=rank, directions=directions)


def random_rows(
    folder: Path,
    model: Path,
    name: str,
    *,
    anchors: int,
    rank: int,
    directions: int | None = None,
    embeddings: Vectors | None = None,
) -> Subject:
    """Create a bank of random rows, or directions, for a model in a folder, without room for user adapters; `name` is
    the model's."""
    settings = load_settings()
    tiny_bank(
        folder,
        model,
        ensure_embedder(settings.embedder, settings.cache_dir),
        anchors=anchors,
        rank=rank,
        directions=directions,
        user_rank=0,
        scale=0.01,  # small enough to keep a real model's answers sound; the size does not affect the cost
        name=name,
        embeddings=embeddings,
    )
    return Subject(folder, model, read_manifest(folder))
