"""The adapter that a gateway exports is the one that the engine serves, by both methods."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from adapters.errors import FusionError, UserAdapterError
from adapters.fusion import fuse
from adapters.raw import to_bits, to_float
from adapters.recipe import FusionMethod, FusionRecipe, Term, parse_recipe
from adapters.user_adapter import encode_user_adapter, stack
from bank.errors import BankError
from bank.manifest import MATRIX_FILE, BankManifest, read_manifest
from bank.matrix import open_matrix
from bank.peft.exported import ExportedAdapter
from bank.peft.imported import read_peft
from bench.rig.tiny import tiny_bank
from tests.support.user_adapters import random_user_adapter

ROUNDED = 1.01 * 2**-8  # by rounding once to bf16, and a little more by float32 sums in another order

Bank = tuple[Path, BankManifest, FusionRecipe]


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
    return folder, manifest, FusionRecipe(manifest.short, method, common, (Term(1, 700), Term(3, 300)))


@pytest.mark.parametrize("stacked", [False, True])
def test_it_is_what_the_engine_makes_and_peft_reads_it(bank: Bank, stacked: bool, tmp_path: Path) -> None:
    folder, manifest, recipe = bank
    user = random_user_adapter(manifest, recipe, scale=0.1)
    adapter = ExportedAdapter(folder, manifest, recipe, encode_user_adapter(manifest.layout, user) if stacked else None)
    adapter.write(tmp_path)
    exported = read_peft(tmp_path)
    wanted = fuse(open_matrix(folder, manifest), recipe, torch.float32)
    wanted = stack(wanted, user, torch.float32) if stacked else wanted
    assert exported.rank == adapter.rank == wanted.rank
    assert exported.a.keys() == wanted.a.keys()
    for name in wanted.a:
        for mine, theirs in ((exported.a[name], wanted.a[name]), (exported.b[name], wanted.b[name])):
            torch.testing.assert_close(mine, theirs, rtol=ROUNDED, atol=1e-6)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.peft_type, config.r, config.lora_alpha) == ("LORA", adapter.rank, adapter.rank)
    assert config.base_model_name_or_path == "tiny"


def test_of_steps_along_directions_it_is_their_sum(
    tmp_path: Path, tiny_model_folder: Path, embedder_folder: Path
) -> None:
    folder = tiny_bank(tmp_path / "bank", tiny_model_folder, embedder_folder, directions=3)
    manifest = read_manifest(folder)
    recipe = FusionRecipe(manifest.short, manifest.method, True, (), steps=(16, -5, 0))
    ExportedAdapter(folder, manifest, recipe).write(tmp_path)
    exported, wanted = read_peft(tmp_path), fuse(open_matrix(folder, manifest), recipe, torch.float32)
    for name, b in wanted.b.items():
        torch.testing.assert_close(exported.b[name], b, rtol=ROUNDED, atol=1e-6)


def test_what_does_not_belong_together_is_refused(bank: Bank, tmp_path: Path) -> None:
    folder, manifest, recipe = bank
    raw = encode_user_adapter(manifest.layout, random_user_adapter(manifest, recipe))
    for damaged in (b"", raw[:-2], raw.replace(b"a01*700", b"a02*700")):
        with pytest.raises(UserAdapterError):
            ExportedAdapter(folder, manifest, recipe, damaged)
    other = parse_recipe(recipe.name.replace(manifest.short, "00000000"))
    with pytest.raises(FusionError, match="belongs to the bank 00000000"):
        ExportedAdapter(folder, manifest, other, raw)
    if not manifest.common:
        with pytest.raises(FusionError, match="no common row"):
            ExportedAdapter(folder, manifest, replace(recipe, common=True, terms=()))
    for matrix in (None, (folder / MATRIX_FILE).read_bytes()[:-8]):  # gone, or cut off
        if matrix is not None:
            (tmp_path / MATRIX_FILE).write_bytes(matrix)
        with pytest.raises(BankError, match=MATRIX_FILE):
            ExportedAdapter(tmp_path, manifest, recipe, raw)


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    drawn = np.random.default_rng(0)
    numbers = (drawn.normal(size=4096) * 10.0 ** drawn.integers(-9, 9, 4096)).astype(np.float32)
    ties = to_float(to_bits(numbers)) + np.float32(2.0**-9) * np.abs(to_float(to_bits(numbers)))
    for values in (numbers, ties, np.array([0.0, -0.0, 1.0, -1.0], np.float32)):
        rounded = torch.from_numpy(values).bfloat16().float()
        torch.testing.assert_close(torch.from_numpy(to_float(to_bits(values))), rounded, rtol=0, atol=0)
