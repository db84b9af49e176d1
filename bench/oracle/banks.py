"""Banks for the oracle: a real one, the same rows as a bank of the other method, and test cases for each."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from adapters.flat import flattened, lora_of
from adapters.lora import LoraWeights, RowLayout, serving_rank
from adapters.matrix import MetaMatrix, write_matrix
from adapters.recipe import FusionMethod, FusionRecipe, Term, UserAdapterId
from adapters.user_adapter import UserAdapter
from bank.manifest import MATRIX_FILE, BankManifest, file_sha256, fused_rank, read_manifest, write_manifest
from bank.matrix import open_matrix
from bench.oracle.dense import dense_adapter
from bench.rig.user_adapters import random_user_adapter
from server.store.adapters import new_adapter_id
from server.store.tenants.user_key import UserKeys

USER_SCALE = 0.05
"""Standard deviation of random user adapters; it changes log-probabilities about as much as training does."""

_KEYS = UserKeys("an oracle's secret", "bench")


@dataclass(frozen=True, slots=True)
class OpenBank:
    """A bank on disk with its rows."""

    folder: Path
    manifest: BankManifest
    matrix: MetaMatrix

    @classmethod
    def open(cls, folder: Path) -> OpenBank:
        """Read a bank."""
        manifest = read_manifest(folder)
        return cls(folder, manifest, open_matrix(folder, manifest))

    def cases(self) -> list[Case]:
        """Return cases for all plain recipes, and for the first one with a user adapter."""
        plain, method = self._recipes(), self.manifest.method.value
        user = random_user_adapter(self.manifest, plain[0], scale=USER_SCALE)
        stacked = replace(plain[0], user_adapter=UserAdapterId(_KEYS.key(method), new_adapter_id()))
        return [*(Case(self, method, recipe) for recipe in plain), Case(self, f"{method} + user", stacked, user)]

    def _recipes(self) -> list[FusionRecipe]:
        """Return recipes with two anchors (one weight negative), without the common row, with one anchor, and none."""
        common, last = self.manifest.common, len(self.manifest.anchors) - 1
        made = [
            (common, (Term(0, 571), Term(last, -429))),
            (False, (Term(1, 300), Term(last - 1, 700))),
            (common, (Term(2, 1000),)),
        ]
        made += [(True, ())] if common else []
        return [FusionRecipe(self.manifest.short, self.manifest.method, c, terms) for c, terms in made]


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """A recipe of a bank, with its user adapter if it has one; `label` is its row in the report."""

    bank: OpenBank
    label: str
    recipe: FusionRecipe
    user: UserAdapter | None = None

    def dense(self, model: Any) -> AbstractContextManager[None]:
        """Return a context in which the model has the recipe's ΔW, including the user adapter."""
        return dense_adapter(model, self.bank.matrix, self.recipe, self.user)


def rewritten(shared: OpenBank, scratch: Path) -> OpenBank:
    """Write the same rows as a bank of method `cat`, in which every row has its own A.

    Each row is rotated within its rank by its own orthogonal Q: (B Qᵀ)(Q A) is the same ΔW, but only with the row's own
    A.
    """
    old, method, folder = shared.manifest, FusionMethod.CAT, scratch / FusionMethod.CAT.value
    folder.mkdir()
    layout = RowLayout(old.layout.modules, old.rank, shared_a=False)
    assert shared.matrix.shared_a is not None
    rows = [
        _turned(layout, lora_of(layout, shared.matrix.shared_a.float(), row.float()), seed)
        for seed, row in enumerate(shared.matrix.rows)
    ]
    write_matrix(folder / MATRIX_FILE, layout, len(rows), rows)
    rank = serving_rank(fused_rank(method, old.rank, old.weights.anchors, old.common) + old.user_rank)
    manifest = old.model_copy(
        update={
            "method": method,
            "serving_rank": rank,
            "files": {MATRIX_FILE: file_sha256(folder / MATRIX_FILE)},
        }
    )
    write_manifest(folder, manifest)
    return OpenBank.open(folder)


def _turned(layout: RowLayout, lora: LoraWeights, seed: int) -> torch.Tensor:
    """Rotate a LoRA within its rank and return it as a row."""
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(lora.rank, lora.rank, generator=generator))
    turned = LoraWeights(
        lora.rank,
        a={name: q @ a for name, a in lora.a.items()},
        b={name: b @ q.T for name, b in lora.b.items()},
    )
    return torch.cat([flattened(layout, turned.a), flattened(layout, turned.b)])
