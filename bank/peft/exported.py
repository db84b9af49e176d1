"""Export a bank's adapter as a PEFT folder, module by module, in numpy: a gateway has neither torch nor an engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from adapters.errors import FusionError, UserAdapterError, excerpt
from adapters.raw import Bits, file_head, read_tensors, read_user_adapter, shapes_of, to_bits, to_float
from adapters.recipe import PER_MILLE, FusionRecipe, Term
from bank.errors import BankError
from bank.manifest import MATRIX_FILE, BankManifest, read_manifest, verify_files

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # prefix of module names in PEFT files


class ExportedAdapter:
    """A recipe's adapter, with the user adapter stacked on it if its bytes are given; `rank` is R of every module.

    Raises BankError if the bank is damaged, FusionError or UserAdapterError if recipe or bytes do not belong to it.
    """

    def __init__(
        self,
        bank: Path,
        manifest: BankManifest,
        recipe: FusionRecipe,
        user: bytes | None = None,
        file: str = MATRIX_FILE,
    ) -> None:
        self._base_model, self._layout = manifest.base_model.name, manifest.layout
        manifest.check(recipe)
        self._rows = recipe.rows(manifest.personal_rows)
        self._matrix = _map_matrix(bank / file, manifest)
        self._user: dict[str, Bits] | None = None
        self._user_rank = 0
        if user is not None:
            trained_on, self._user_rank, self._user = read_user_adapter(self._layout, user)
            if trained_on != recipe.plain.name:
                raise UserAdapterError(
                    f"user adapter was trained on {trained_on}, but {recipe.plain.name} was expected"
                )
        self.rank = manifest.rank_of(recipe) + self._user_rank

    def write(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / CONFIG_FILE).write_text(json.dumps(self.config(), indent=2), "utf-8")
            with (folder / WEIGHTS_FILE).open("wb") as file:
                file.writelines(self.weights())
        except OSError as error:
            raise BankError(f"cannot write a PEFT adapter to {folder}: {error}") from error

    def config(self) -> dict[str, Any]:
        """Return the content of `adapter_config.json`; alpha equals the rank because B already includes the scaling."""
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": self._base_model,
            "r": self.rank,
            "lora_alpha": self.rank,
            # Full names, because the last parts alone could match other modules.
            "target_modules": sorted(module.name for module in self._layout.modules),
            "bias": "none",
            "lora_dropout": 0.0,
            "inference_mode": True,
        }

    def weights(self) -> Iterator[bytes]:
        """Yield the bytes of `adapter_model.safetensors`, one module at a time."""
        shapes: list[tuple[str, tuple[int, ...]]] = []
        for module in self._layout.modules:
            shapes.append((f"{PREFIX}{module.name}.lora_A.weight", (self.rank, module.h_in)))
            shapes.append((f"{PREFIX}{module.name}.lora_B.weight", (module.h_out, self.rank)))
        yield file_head(shapes, {"format": "pt"})
        users_a = users_b = 0
        for module, a_cut, b_cut in self._layout.slices():
            a, b = self._fused(a_cut, b_cut)
            if self._user is not None:
                rank = self._user_rank
                a.append(self._user["a"][users_a : users_a + rank * module.h_in])
                b.append(self._user["b"][users_b : users_b + rank * module.h_out])
                users_a, users_b = users_a + rank * module.h_in, users_b + rank * module.h_out
            yield np.concatenate([block.reshape(-1, module.h_in) for block in a]).tobytes()
            yield np.concatenate([block.reshape(module.h_out, -1) for block in b], axis=1).tobytes()

    def _fused(self, a_cut: slice, b_cut: slice) -> tuple[list[Bits], list[Bits]]:
        """Return a module's blocks of A and B without the user adapter: one each if A is shared, else one per row."""
        rows = self._matrix["rows"]
        if self._layout.shared_a:
            b = sum(to_float(rows[row, b_cut]) * np.float32(weight) for row, weight in self._rows)
            return [self._matrix["shared_a"].reshape(-1)[a_cut]], [to_bits(np.asarray(b, np.float32))]
        split = self._layout.a_numbers
        b_cut = slice(split + b_cut.start, split + b_cut.stop)
        return (
            [rows[row, a_cut] for row, _ in self._rows],
            [to_bits(to_float(rows[row, b_cut]) * np.float32(weight)) for row, weight in self._rows],
        )


def _map_matrix(path: Path, manifest: BankManifest) -> dict[str, Bits]:
    try:
        matrix, _ = read_tensors(np.memmap(path, np.uint8, "r"))
    except (OSError, ValueError) as error:
        raise BankError(f"cannot read the meta-LoRA matrix {path}: {error}") from error
    layout, shapes = manifest.layout, shapes_of(matrix)
    wanted = (manifest.personal_rows + manifest.common, layout.row_numbers)
    if shapes.get("rows") != wanted or (layout.shared_a and shapes.get("shared_a") != (layout.a_numbers,)):
        raise BankError(f"{path} holds {shapes}, but the manifest says rows of {wanted}: copy the bank again")
    return matrix


def export_anchor(bank: Path, anchor: str, out: Path, with_common: bool = False) -> BankManifest:
    """Write one anchor's meta-LoRA as a PEFT folder, alone or together with the common row; return its manifest."""
    manifest = read_manifest(bank)
    ids = [entry.id for entry in manifest.anchors]
    if anchor not in ids:
        raise BankError(f"the bank at {bank} has no anchor {excerpt(anchor)}; its anchors are {ids[0]} to {ids[-1]}")
    verify_files(bank, manifest, (manifest.anchor_rows_file,))
    people = manifest.model_copy(update={"directions": None})
    recipe = FusionRecipe(manifest.short, manifest.method, with_common, (Term(ids.index(anchor), PER_MILLE),))
    try:
        ExportedAdapter(bank, people, recipe, file=manifest.anchor_rows_file).write(out)
    except FusionError as error:
        raise BankError(str(error)) from error
    return manifest
