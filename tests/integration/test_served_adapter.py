"""The adapter that a gateway exports is the one that the engine serves, by every method and with every kind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from adapters.errors import FusionError, UserAdapterError
from adapters.fusion import fuse
from adapters.lora import LoraWeights
from adapters.raw import to_bits, to_float
from adapters.recipe import FusionMethod, FusionRecipe, Term, parse_recipe
from adapters.training.trainer import initial_lora
from adapters.user_adapter import CoreWeights, UserAdapter, encode_user_adapter, stack
from bank.errors import BankError
from bank.manifest import MATRIX_FILE, BankManifest, read_manifest
from bank.matrix import open_matrix
from bank.peft.peft_adapter import read_peft
from bank.peft.served import CONFIG_FILE, WEIGHTS_FILE, ServedAdapter
from bench.rig.tiny import tiny_bank

ROUNDED = 1.01 * 2**-8
"""How much rounding once to bf16 may change a number, and float32 sums in another order a little more."""


@dataclass(frozen=True)
class Bank:
    """A bank of one of the methods, and a recipe of it."""

    folder: Path
    manifest: BankManifest
    recipe: FusionRecipe

    def user(self, kind: str) -> UserAdapter:
        """A random user adapter of the recipe."""
        modules, drawn = self.manifest.layout.modules, torch.Generator().manual_seed(3)
        if kind == "core":
            rank = self.manifest.rank_of(self.recipe)
            core = {m.name: torch.randn(rank, rank, generator=drawn) / 8 for m in modules}
            return UserAdapter(self.recipe.name, CoreWeights(rank, core))
        start = initial_lora(modules, 2, seed=5)
        b = {name: torch.randn(b.shape, generator=drawn) / 8 for name, b in start.b.items()}
        return UserAdapter(self.recipe.name, LoraWeights(2, start.a, b))

    def raw(self, kind: str) -> bytes:
        """Its bytes."""
        return encode_user_adapter(self.manifest.layout, self.user(kind))

    def served(self, raw: bytes, recipe: FusionRecipe | None = None) -> ServedAdapter:
        return ServedAdapter(self.folder, self.manifest, recipe or self.recipe, raw)


@pytest.fixture(scope="module", params=[(m, common) for m in FusionMethod for common in (True, False)], ids=str)
def bank(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    embedder_folder: Path,
) -> Bank:
    method, common = request.param
    folder = tmp_path_factory.mktemp("bank")
    tiny_bank(folder, tiny_model_folder, embedder_folder, method=method, common=common)
    manifest = read_manifest(folder)
    recipe = FusionRecipe(manifest.short, method, common, (Term(1, 700), Term(3, 300)))
    return Bank(folder, manifest, recipe)


@pytest.mark.parametrize("kind", ["lora", "core"])
def test_it_is_what_the_engine_makes_and_peft_reads_it(bank: Bank, kind: str, tmp_path: Path) -> None:
    user = bank.user(kind)
    served = bank.served(bank.raw(kind))
    (tmp_path / CONFIG_FILE).write_text(json.dumps(served.config()))
    (tmp_path / WEIGHTS_FILE).write_bytes(b"".join(served.weights()))
    exported = read_peft(tmp_path)
    fused = fuse(open_matrix(bank.folder, bank.manifest), bank.recipe, torch.float32)
    wanted = stack(fused, UserAdapter(user.recipe, _rounded(user.weights)), torch.float32)
    assert exported.rank == served.rank == wanted.rank
    assert exported.a.keys() == wanted.a.keys()
    for name in wanted.a:
        for mine, theirs in ((exported.a[name], wanted.a[name]), (exported.b[name], wanted.b[name])):
            torch.testing.assert_close(mine, theirs, rtol=ROUNDED, atol=1e-6)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.peft_type, config.r, config.lora_alpha) == ("LORA", served.rank, served.rank)
    assert config.base_model_name_or_path == "tiny"


def test_what_does_not_belong_together_is_refused(bank: Bank) -> None:
    raw = bank.raw("lora")
    for damaged in (b"", raw[:40], raw[:-2], b"x" * 200, raw.replace(b"a01*700", b"a02*700")):
        with pytest.raises(UserAdapterError):
            bank.served(damaged)
    with pytest.raises(FusionError, match="belongs to the bank 00000000"):
        bank.served(raw, parse_recipe(bank.recipe.name.replace(bank.manifest.short, "00000000")))
    with pytest.raises(FusionError, match="has only 4 anchors"):
        bank.served(raw, parse_recipe(bank.recipe.name.replace("a03", "a04")))


def test_a_bank_whose_matrix_is_gone_or_cut_off_is_named(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(BankError, match=MATRIX_FILE):
        ServedAdapter(tmp_path, bank.manifest, bank.recipe, bank.raw("lora"))
    (tmp_path / MATRIX_FILE).write_bytes((bank.folder / MATRIX_FILE).read_bytes()[:-8])
    with pytest.raises(BankError, match=MATRIX_FILE):
        ServedAdapter(tmp_path, bank.manifest, bank.recipe, bank.raw("lora"))


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    drawn = np.random.default_rng(0)
    numbers = (drawn.normal(size=4096) * 10.0 ** drawn.integers(-9, 9, 4096)).astype(np.float32)
    ties = to_float(to_bits(numbers)) + np.float32(2.0**-9) * np.abs(to_float(to_bits(numbers)))
    for values in (numbers, ties, np.array([0.0, -0.0, 1.0, -1.0], np.float32)):
        torch.testing.assert_close(
            torch.from_numpy(to_float(to_bits(values))), torch.from_numpy(values).bfloat16().float(), rtol=0, atol=0
        )


def _rounded(weights: LoraWeights | CoreWeights) -> LoraWeights | CoreWeights:
    """As they are stored."""
    if isinstance(weights, CoreWeights):
        return CoreWeights(weights.rank, {name: c.bfloat16().float() for name, c in weights.c.items()})
    a, b = ({name: part.bfloat16() for name, part in side.items()} for side in (weights.a, weights.b))
    return LoraWeights(weights.rank, a, b)
