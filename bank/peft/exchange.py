"""Banks and PEFT: anchors leave as PEFT adapters, and PEFT adapters with profiles become anchors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from adapters.errors import FusionError, excerpt
from adapters.flat import flat_a, flat_b
from adapters.lora import ModuleShape, RowLayout
from adapters.recipe import PER_MILLE, FusionMethod, FusionRecipe, Term
from bank.building.assemble import BankParts, bank_rank, write_bank
from bank.building.options import ImportOptions
from bank.building.selection import person_embedding
from bank.errors import BankError
from bank.items.histories import History, read_histories
from bank.items.tasks import get_task
from bank.lookup.embedder import Embedder
from bank.manifest import MATRIX_FILE, BankManifest, BaseModelId, EmbedderId, read_manifest, verify_files
from bank.models.folders import model_hash
from bank.peft.exported import ExportedAdapter
from bank.peft.peft_adapter import PeftAdapter, read_peft
from bank.rules import WeightRule


def export_anchor(bank: Path, anchor: str, out: Path, with_common: bool = False) -> None:
    """Write one anchor's meta-LoRA as a PEFT folder, alone or with the common row in the same adapter."""
    manifest = read_manifest(bank)
    ids = [entry.id for entry in manifest.anchors]
    if anchor not in ids:
        raise BankError(f"the bank at {bank} has no anchor {excerpt(anchor)}; its anchors are {ids[0]} to {ids[-1]}")
    verify_files(bank, manifest, (MATRIX_FILE,))
    recipe = FusionRecipe(manifest.short, manifest.method, with_common, (Term(ids.index(anchor), PER_MILLE),))
    try:
        ExportedAdapter(bank, manifest, recipe).write(out)
    except FusionError as error:
        raise BankError(str(error)) from error


def import_bank(
    adapters: Sequence[Path],
    profiles: Path,
    out: Path,
    options: ImportOptions,
    *,
    model_folder: Path,
    base_model: str,
    embedder: Embedder,
) -> BankManifest:
    """Make a bank from PEFT folders, in anchor order; adapters of smaller rank are padded to the largest.

    Profiles come in LaMP's per-user layout; each `user_id` is the name of an adapter's folder.
    """
    task = get_task(options.task)
    read = [read_peft(folder) for folder in adapters]
    people = _profiles_of(read, {person.user_id: person for person in read_histories(profiles, task)}, profiles)
    modules = _common_modules(read, model_folder)
    layout = RowLayout(modules, max(adapter.rank for adapter in read), shared_a=False)
    rule = WeightRule(anchors=min(options.k, len(read)))
    bank_rank(FusionMethod.CAT, layout.rank, rule, False, options.user_rank)
    sizes = {module.name: (module.h_in, module.h_out) for module in modules}
    loras = [adapter.padded(sizes, layout.rank) for adapter in read]
    parts = BankParts(
        task=task.name,
        base_model=BaseModelId(name=base_model, hash=model_hash(model_folder)),
        embedder=EmbedderId(id=embedder.id, dim=embedder.dim),
        method=FusionMethod.CAT,
        common=False,
        user_rank=options.user_rank,
        weights=rule,
        layout=layout,
        rows=[torch.cat([flat_a(layout, lora), flat_b(layout, lora)]) for lora in loras],
        shared_a=None,
        embeddings=np.stack([person_embedding(person, task, embedder) for person in people]),
        items=[len(person.items) for person in people],
        training={"imported": True},
    )
    return write_bank(out, parts)


def _profiles_of(read: Sequence[PeftAdapter], profiles: dict[str, History], path: Path) -> list[History]:
    names = [adapter.name for adapter in read]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise BankError(f"adapter folders must have distinct names; these repeat: {excerpt(repeated)}")
    if missing := [name for name in names if name not in profiles]:
        raise BankError(f"{path} has no profile for {excerpt(missing)}: user_id must be the adapter folder's name")
    return [profiles[name] for name in names]


def _common_modules(read: Sequence[PeftAdapter], model_folder: Path) -> tuple[ModuleShape, ...]:
    """Every module that any adapter has, layer by layer, checked against the base model's own shapes."""
    shapes = linear_shapes(model_folder)
    names = {name for adapter in read for name in adapter.a}
    for adapter in read:
        for name, a in adapter.a.items():
            found = (adapter.b[name].shape[0], a.shape[1])
            if shapes.get(name) != found:
                raise BankError(
                    f"adapter {adapter.name} does not fit the base model: {name} is {found} there, "
                    f"{shapes.get(name, 'absent')} in {model_folder}"
                )
    return tuple(ModuleShape(name, shapes[name][1], shapes[name][0]) for name in sorted(names, key=_natural))


def linear_shapes(model_folder: Path) -> dict[str, tuple[int, int]]:
    """Module name → (H_out, H_in) of every matrix in the base model's safetensors, from their headers alone."""
    from safetensors import safe_open

    shapes = {}
    for path in sorted(model_folder.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 - the handle is not a mapping
                shape = file.get_slice(key).get_shape()
                if key.endswith(".weight") and len(shape) == 2:
                    shapes[key.removesuffix(".weight")] = (shape[0], shape[1])
    if not shapes:
        raise BankError(f"the base model at {model_folder} has no *.safetensors to check adapters against")
    return shapes


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
