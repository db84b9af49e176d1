"""The adapter that a gateway exports is the one that the engine serves, by both methods."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from adapters.errors import FusionError, UserAdapterError
from adapters.fusion import fuse
from adapters.raw import to_bits, to_float
from adapters.recipe import FusionMethod, FusionRecipe, Term, parse_recipe
from adapters.user_adapter import UserAdapter, encode_user_adapter, stack
from bank.errors import BankError
from bank.manifest import MATRIX_FILE, BankManifest, read_manifest
from bank.matrix import open_matrix
from bank.peft.exported import ExportedAdapter
from bank.peft.imported import read_peft
from bench.rig.tiny import tiny_bank
from bench.rig.user_adapters import random_user_adapter

ROUNDED = 1.01 * 2**-8
"""How much rounding once to bf16 may change a number, and float32 sums in another order a little more."""


@dataclass(frozen=True)
class Bank:
    """A bank of one of the methods, and a recipe of it."""

    folder: Path
    manifest: BankManifest
    recipe: FusionRecipe

    @property
    def user(self) -> UserAdapter:
        return random_user_adapter(self.manifest, self.recipe, scale=0.1)

    @property
    def raw(self) -> bytes:
        return encode_user_adapter(self.manifest.layout, self.user)

    def exported(self, raw: bytes | None, recipe: FusionRecipe | None = None) -> ExportedAdapter:
        return ExportedAdapter(self.folder, self.manifest, recipe or self.recipe, raw)


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


@pytest.mark.parametrize("stacked", [False, True])
def test_it_is_what_the_engine_makes_and_peft_reads_it(bank: Bank, stacked: bool, tmp_path: Path) -> None:
    adapter = bank.exported(bank.raw if stacked else None)
    adapter.write(tmp_path)
    exported = read_peft(tmp_path)
    wanted = fuse(open_matrix(bank.folder, bank.manifest), bank.recipe, torch.float32)
    wanted = stack(wanted, bank.user, torch.float32) if stacked else wanted
    assert exported.rank == adapter.rank == wanted.rank
    assert exported.a.keys() == wanted.a.keys()
    for name in wanted.a:
        for mine, theirs in ((exported.a[name], wanted.a[name]), (exported.b[name], wanted.b[name])):
            torch.testing.assert_close(mine, theirs, rtol=ROUNDED, atol=1e-6)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.peft_type, config.r, config.lora_alpha) == ("LORA", adapter.rank, adapter.rank)
    assert config.base_model_name_or_path == "tiny"


def test_what_does_not_belong_together_is_refused(bank: Bank) -> None:
    raw = bank.raw
    for damaged in (b"", raw[:40], raw[:-2], b"x" * 200, raw.replace(b"a01*700", b"a02*700")):
        with pytest.raises(UserAdapterError):
            bank.exported(damaged)
    with pytest.raises(FusionError, match="belongs to the bank 00000000"):
        bank.exported(raw, parse_recipe(bank.recipe.name.replace(bank.manifest.short, "00000000")))
    if not bank.manifest.common:
        with pytest.raises(FusionError, match="no common row"):
            bank.exported(raw, replace(bank.recipe, common=True, terms=()))
    with pytest.raises(FusionError, match="anchors a00 to a03"):
        bank.exported(raw, parse_recipe(bank.recipe.name.replace("a03", "a04")))


def test_a_bank_whose_matrix_is_gone_or_cut_off_is_named(bank: Bank, tmp_path: Path) -> None:
    with pytest.raises(BankError, match=MATRIX_FILE):
        ExportedAdapter(tmp_path, bank.manifest, bank.recipe, bank.raw)
    (tmp_path / MATRIX_FILE).write_bytes((bank.folder / MATRIX_FILE).read_bytes()[:-8])
    with pytest.raises(BankError, match=MATRIX_FILE):
        ExportedAdapter(tmp_path, bank.manifest, bank.recipe, bank.raw)


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    drawn = np.random.default_rng(0)
    numbers = (drawn.normal(size=4096) * 10.0 ** drawn.integers(-9, 9, 4096)).astype(np.float32)
    ties = to_float(to_bits(numbers)) + np.float32(2.0**-9) * np.abs(to_float(to_bits(numbers)))
    for values in (numbers, ties, np.array([0.0, -0.0, 1.0, -1.0], np.float32)):
        torch.testing.assert_close(
            torch.from_numpy(to_float(to_bits(values))), torch.from_numpy(values).bfloat16().float(), rtol=0, atol=0
        )
