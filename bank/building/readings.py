"""How training reads texts with a bank's adapters: for `mta verify`, and for the canary, which a bank records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adapters.fusion import fuse
from adapters.lora import LoraWeights
from adapters.recipe import FusionRecipe, Term
from adapters.training.attached import attached
from adapters.training.example import Example
from adapters.training.forward.shared_part import SharedPart
from adapters.training.loss import example_losses
from bank.items.profile import Vectors
from bank.manifest import BASE, BankManifest, Canary
from bank.matrix import open_matrix, shared_part

TEXTS = (
    ("How was your day?", "Quiet. I bought bread and apples at the market, and read until the rain was over."),
    ("Write to a neighbour.", "Dear neighbour, thank you for your ladder. I will bring it back on Saturday."),
    ("Why is the sky blue?", "The air scatters short waves more than long ones, so blue light comes from every side."),
    ("What can I cook?", "A soup: fry an onion in oil, add lentils and water, and let it cook for half an hour."),
)
_TOKENS = 24  # of the canary: few, since every engine reads them when it starts


def trial_recipes(manifest: BankManifest) -> list[FusionRecipe]:
    """Return the common recipe, if there is one, one of steps in both directions and one of weights as by topics."""
    recipes, last = [manifest.common_recipe] * manifest.common, len(manifest.anchors) - 1
    for weights in ((900, -700), (300, 200)):
        steps = tuple(weight // 150 for weight in weights) * (manifest.directions or 0)
        terms = () if steps else tuple(map(Term, sorted({0, last})[: manifest.weights.anchors], weights))
        steps = steps[: manifest.directions]
        recipes.append(FusionRecipe(manifest.short, manifest.method, manifest.common, terms, steps=steps))
    return recipes


def readings(
    model: Any, examples: Sequence[Example], adapters: Mapping[str, LoraWeights], shared: SharedPart | None
) -> list[dict[str, Vectors]]:
    """Return the log-probabilities of each example's output tokens: the base model's, and by name those of adapters."""
    by_example = [{BASE: -losses.numpy()} for losses in example_losses(model, examples)]
    for name, lora in adapters.items():
        with attached(model, lora, shared=shared) as here:
            for read, losses in zip(by_example, example_losses(here.model, examples), strict=True):
                read[name] = -losses.numpy()
    return by_example


def record_canary(model: Any, tokenizer: Any, folder: Path, manifest: BankManifest) -> Canary:
    """Read a few tokens with the common row and a recipe of the matrix in a folder."""
    ids = tokenizer.encode(" ".join(answer for _, answer in TEXTS))[:_TOKENS]
    example = Example(tuple(ids), 8, system=4)
    matrix = open_matrix(folder, manifest)
    adapters = {recipe.name: fuse(matrix, recipe, torch.float32) for recipe in trial_recipes(manifest)[:2]}
    (reading,) = readings(model, [example], adapters, shared_part(matrix, manifest))
    read = {name.split(":", 3)[-1]: tuple(part.astype(float).round(3).tolist()) for name, part in reading.items()}
    shared = example.personal_from(manifest.acts)
    return Canary(ids=example.ids, read_from=example.loss_from, shared=shared, read=read)
