"""The adapter that a method uses for a person: a recipe of an open bank, and what was trained on top of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from adapters.fusion import fuse
from adapters.lora import LoraWeights
from adapters.matrix import MetaMatrix
from adapters.recipe import FusionRecipe
from adapters.user_adapter import UserAdapter, stack
from bank.building.baselines import BASELINES
from bank.errors import BankError
from bank.lookup.serving import ServingBank
from bank.manifest import BankManifest
from bank.matrix import open_matrix


@dataclass(frozen=True, slots=True)
class OpenBank:
    """A bank with its rows and its lookups.

    Attributes:
        serving: finds recipes.
        matrix: fuses them.
        folder: where it is.
    """

    serving: ServingBank
    matrix: MetaMatrix
    folder: Path

    @classmethod
    def open(cls, folder: Path, embedder_id: str) -> OpenBank:
        """Open a bank, rows and all.

        Raises:
            BankError: when it is missing, damaged, or made with another embedder.
        """
        serving = ServingBank.open(folder, embedder_id)
        return cls(serving, open_matrix(folder, serving.manifest), folder)

    def of_task(self, embedder_id: str) -> OpenBank:
        """The bank of the task's own row, which was trained from this one's common row.

        Raises:
            BankError: when there is none, or it was trained from another bank's.
        """
        folder = self.folder / BASELINES
        found = OpenBank.open(folder, embedder_id) if folder.is_dir() else None
        if found is None or found.manifest.training.get("of") != self.manifest.fingerprint:
            said = "is that of another bank" if found else "is not there"
            raise BankError(f"the task's row {said} ({folder}): build the bank at {self.folder} again with --baselines")
        return found

    @property
    def manifest(self) -> BankManifest:
        """The bank's manifest."""
        return self.serving.manifest

    def fused(self, recipe: FusionRecipe) -> LoraWeights:
        """What a recipe stands for, float32."""
        return fuse(self.matrix, recipe, torch.float32)


@dataclass(frozen=True, slots=True)
class PersonAdapter:
    """The adapter that one person is evaluated under.

    Attributes:
        bank: the one that the recipe is for.
        recipe: what is fused.
        trained: weights from few-shot training, stacked on it, or None.
    """

    bank: OpenBank
    recipe: FusionRecipe
    trained: LoraWeights | None = None

    @property
    def user_adapter(self) -> UserAdapter | None:
        """What was trained, with the recipe it is for."""
        return UserAdapter(self.recipe.name, self.trained) if self.trained else None

    def lora(self) -> LoraWeights:
        """Recipe and trained weights together, float32."""
        fused, user = self.bank.fused(self.recipe), self.user_adapter
        return stack(fused, user, torch.float32) if user else fused
