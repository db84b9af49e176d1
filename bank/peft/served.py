"""The adapter that serves a user as a PEFT folder's two files, in plain numpy: gateways have no torch.

What `adapters/fusion.py` and `adapters/user_adapter.py` do for the engine is done here module by module, so that never
more than one of them is in memory; their formulas, and the tests, say that it is the same adapter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from adapters.errors import FusionError, UserAdapterError
from adapters.lora import ModuleShape
from adapters.raw import USER_FORMAT, RawTensors, file_head, to_bits, to_float
from adapters.recipe import PER_MILLE, FusionMethod, FusionRecipe
from bank.errors import BankError
from bank.manifest import MATRIX_FILE, BankManifest

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT puts before the names of modules."""

Numbers = npt.NDArray[np.float32]


class ServedAdapter:
    """What a recipe stands for, with the user adapter that is stacked on it.

    Args:
        bank: the bank's folder; only its matrix is read, and of that only the recipe's rows.
        manifest: the bank's.
        recipe: of this bank.
        user: the bytes of the user adapter.

    Raises:
        BankError: when the bank's matrix is missing or damaged.
        FusionError: when the recipe is of another bank, or asks for what the bank lacks.
        UserAdapterError: when the bytes are not a user adapter of the recipe and this bank.
    """

    def __init__(self, bank: Path, manifest: BankManifest, recipe: FusionRecipe, user: bytes) -> None:
        if recipe.bank != manifest.short:
            raise FusionError(f"the recipe belongs to the bank {recipe.bank}, but this one is {manifest.short}")
        self._base_model, self._layout, self._recipe = manifest.base_model.name, manifest.layout, recipe.plain
        self._anchors = len(manifest.anchors)
        if recipe.terms and recipe.terms[-1].anchor >= self._anchors:
            raise FusionError(
                f"bank {recipe.bank} has only {self._anchors} anchors, got the recipe {recipe.plain.name}"
            )
        self._matrix = self._opened(bank / MATRIX_FILE, manifest)
        self._user, self._kind, self._user_rank = self._decoded(user)
        self.rank = manifest.rank_of(recipe) + (self._user_rank if self._kind == "lora" else 0)
        """R of every module."""

    def config(self) -> dict[str, Any]:
        """The content of `adapter_config.json`; alpha equals the rank, because scaling is in B already."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._base_model,
            "r": self.rank,
            "lora_alpha": self.rank,
            "target_modules": sorted(module.name for module in self._layout.modules),
            "bias": "none",
            "lora_dropout": 0.0,
            "inference_mode": True,
        }

    def weights(self) -> Iterator[bytes]:
        """The bytes of `adapter_model.safetensors`, a module at a time."""
        modules = self._layout.modules
        shapes: list[tuple[str, tuple[int, ...]]] = []
        for module in modules:
            shapes.append((f"{PREFIX}{module.name}.lora_A.weight", (self.rank, module.h_in)))
            shapes.append((f"{PREFIX}{module.name}.lora_B.weight", (module.h_out, self.rank)))
        yield file_head(shapes, {"format": "pt"})
        users_a = users_b = 0
        cuts = zip(self._layout.a_slices(), self._layout.b_slices(), strict=True)
        for place, ((module, a_cut), (_, b_cut)) in enumerate(cuts):
            a, b = self._fused(module, a_cut, b_cut)
            if self._kind == "core":
                size = self._user_rank**2
                core = to_float(self._user["c"][place * size : (place + 1) * size])
                b = b + b @ core.reshape(self._user_rank, self._user_rank)
            else:
                rank = self._user_rank
                mine = to_float(self._user["a"][users_a : users_a + rank * module.h_in]).reshape(rank, -1)
                theirs = to_float(self._user["b"][users_b : users_b + rank * module.h_out]).reshape(-1, rank)
                a, b = np.concatenate([a, mine]), np.concatenate([b, theirs], axis=1)
                users_a, users_b = users_a + rank * module.h_in, users_b + rank * module.h_out
            yield to_bits(a).tobytes() + to_bits(b).tobytes()

    def _fused(self, module: ModuleShape, a_cut: slice, b_cut: slice) -> tuple[Numbers, Numbers]:
        """A module's A [R', H_in] and B [H_out, R'] without the user adapter."""
        rank, method, recipe = self._layout.rank, self._recipe.method, self._recipe
        rows = [(self._anchors, 1.0)] * recipe.common + [(t.anchor, t.weight / PER_MILLE) for t in recipe.terms]
        shared = method is FusionMethod.SHARED
        split = 0 if shared else self._layout.a_numbers

        def b_of(row: int) -> Numbers:
            return to_float(self._matrix["rows"][row, split + b_cut.start : split + b_cut.stop]).reshape(-1, rank)

        def a_of(row: int) -> Numbers:
            return to_float(self._matrix["rows"][row, a_cut]).reshape(rank, -1)

        if shared:
            a = to_float(self._matrix["shared_a"].reshape(-1)[a_cut]).reshape(rank, -1)
            return a, _sum([b_of(row) * np.float32(weight) for row, weight in rows])
        if method is FusionMethod.CAT:
            blocks = [(a_of(row), b_of(row) * np.float32(weight)) for row, weight in rows]
        else:
            blocks = [(a_of(row), b_of(row)) for row, _ in rows[: recipe.common]]
            if recipe.terms:
                weighed = [(row, np.float32(weight)) for row, weight in rows[recipe.common :]]
                blocks.append((_sum([a_of(r) * w for r, w in weighed]), _sum([b_of(r) * w for r, w in weighed])))
        return np.concatenate([a for a, _ in blocks]), np.concatenate([b for _, b in blocks], axis=1)

    def _opened(self, path: Path, manifest: BankManifest) -> RawTensors:
        try:
            matrix = RawTensors.open(path)
        except (OSError, ValueError) as error:
            raise BankError(f"cannot read the meta-LoRA matrix {path}: {error}") from error
        wanted = (self._anchors + manifest.common, self._layout.row_numbers)
        shared = matrix.shapes.get("shared_a", (0,))
        if matrix.shapes.get("rows") != wanted or (self._layout.shared_a and shared != (self._layout.a_numbers,)):
            raise BankError(
                f"{path} holds {matrix.shapes}, but the manifest says rows of {wanted}: copy the bank again"
            )
        return matrix

    def _decoded(self, raw: bytes) -> tuple[RawTensors, str, int]:
        """A user adapter's tensors, its kind and its rank."""
        try:
            tensors = RawTensors(np.frombuffer(raw, np.uint8))
            header = json.loads(tensors.metadata[USER_FORMAT])
            kind, rank, recipe = str(header["kind"]), int(header["rank"]), str(header["recipe"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserAdapterError(f"user adapter of {len(raw)} bytes cannot be read: {error}") from error
        modules = self._layout.modules
        if kind == "core":
            expected = {"c": rank * rank * len(modules)}
        else:
            expected = {"a": rank * sum(m.h_in for m in modules), "b": rank * sum(m.h_out for m in modules)}
        found = {name: int(np.prod(shape)) for name, shape in tensors.shapes.items()}
        if recipe != self._recipe.name or found != expected or rank < 1:
            raise UserAdapterError(
                f"user adapter ({kind}, rank {rank}, of {recipe}) holds {found} numbers, but {expected} of "
                f"{self._recipe.name} were expected"
            )
        return tensors, kind, rank


def _sum(parts: list[Numbers]) -> Numbers:
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total
