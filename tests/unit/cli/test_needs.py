"""What a base model needs is computed from its configuration, and is what its files and its engine take."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from adapters.lora import ModuleShape, RowLayout
from adapters.recipe import FusionRecipe
from adapters.training.adapt_config import AdaptConfig
from adapters.training.example import Example
from adapters.training.forward.packing import pack
from adapters.training.loss import backward_row
from adapters.training.trainer import initial_lora, linear_modules
from adapters.training.user_trainer import TrainingProgress, user_run
from adapters.user_adapter import encode_user_adapter
from bank.manifest import MATRIX_FILE, read_manifest
from server.cli import app
from server.cli.run.needs import GIB, KIB, Needs, needs_of, trained_bytes
from server.engine.command import VIEW_BYTES, VIEWS, slot_bytes
from server.settings import Settings
from tests.support.user_adapters import random_user_adapter

ROOT = Path(__file__).parents[3]
HEADER_BYTES = 8 * KIB  # most that the header of a safetensors file of a tiny model takes
LLAMA = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}


def llama(size: str) -> LlamaConfig:
    return LlamaConfig(vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192, **LLAMA[size])


def test_computed_needs_equal_the_file_sizes_of_a_small_model(tiny_model_folder: Path, tiny_bank_folder: Path) -> None:
    needs, manifest = Needs.of(AutoConfig.from_pretrained(tiny_model_folder)), read_manifest(tiny_bank_folder)
    user = random_user_adapter(manifest, FusionRecipe(manifest.short, manifest.method, True, ()), rank=2)
    for computed, measured in (
        (2 * needs.parameters, (tiny_model_folder / "model.safetensors").stat().st_size),
        (needs.bank_bytes(manifest.rank, len(manifest.anchors)), (tiny_bank_folder / MATRIX_FILE).stat().st_size),
        (needs.adapter_bytes(2), len(encode_user_adapter(manifest.layout, user))),
    ):
        assert computed < measured < computed + HEADER_BYTES
    slot = slot_bytes([manifest], 2) - len(manifest.modules) * VIEWS * VIEW_BYTES
    assert needs.adapter_bytes(manifest.serving_rank) == slot


@pytest.mark.parametrize(("size", "parameters"), [("8B", 8_030_261_248), ("70B", 70_553_706_496)])
def test_the_page_has_the_figures_of_the_sizes_that_it_names(size: str, parameters: int) -> None:
    needs = Needs.of(llama(size))
    assert needs.parameters == parameters
    page = (ROOT / "docs/models.md").read_text("utf-8")
    [heads] = re.findall(r"^\| Llama 3 of .*\|$", page, re.MULTILINE)
    column = [head.strip() for head in heads.split("|")].index(size)
    for what, figure in needs.table():
        [line] = [line for line in page.splitlines() if line.startswith(f"| {what} |")]
        assert line.split("|")[column].strip() == figure


def test_a_token_in_training_takes_no_more_than_is_planned(tiny_model_folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.bfloat16, attn_implementation="sdpa")
    lora, kept = initial_lora(linear_modules(model), 8, seed=0), dict[int, torch.Tensor]()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with user_run(model.requires_grad_(False), lora, AdaptConfig(), TrainingProgress(0, 0, 0.0)) as run:
        [row] = pack(model, [Example((5,) * 400, 1)])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            backward_row(model, row, 1, run.below)
        weights = {each.untyped_storage().data_ptr() for each in model.state_dict().values()}
    taken = sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in weights) / 400
    planned = trained_bytes(RowLayout(linear_modules(model), 8, shared_a=True), model.config.vocab_size)
    assert taken < planned < 2 * taken


def test_each_gpu_holds_its_slices() -> None:
    whole = Needs.of(llama("8B"))
    half = whole.on_each_of(2)
    shapes = {m.name.rpartition(".")[2]: (m.h_in, m.h_out) for m in half.modules}
    assert shapes["k_proj"] == (4096, 512)
    assert shapes["down_proj"] == (7168, 4096)
    assert (half.parameters, half.bytes_a_token) == (whole.parameters // 2, whole.bytes_a_token // 2)
    unknown = replace(whole, modules=(ModuleShape("model.dense", 8, 6),))
    assert unknown.on_each_of(2).modules == unknown.modules


def test_the_command_prints_them_without_weights(tmp_path: Path) -> None:
    llama("8B").save_pretrained(tmp_path)
    printed = CliRunner().invoke(app, ["models", "--model", str(tmp_path), "--needs"])
    assert printed.exit_code == 0, printed.output
    assert [re.split(r"  +", line) for line in printed.stdout.splitlines()] == [
        *map(list, Needs.of(llama("8B")).table())
    ]
    refused = CliRunner().invoke(app, ["models", "--model", str(tmp_path / "none"), "--needs"])
    assert "cannot read the configuration of the base model" in str(refused.exception)


@pytest.mark.parametrize(
    ("quantised", "bits"),
    [
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, 4),
    ],
    ids=["awq", "fp8", "compressed-tensors"],
)
def test_quantised_model_is_served_as_is_and_trained_in_16_bits(
    tmp_path: Path, tiny_bank_folder: Path, quantised: dict[str, Any], bits: int
) -> None:
    config = llama("8B").to_dict() | {"quantization_config": quantised, "dtype": "bfloat16"}
    nested = {"text_config": config, "quantization_config": quantised}
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(4 * GIB)
    for written in (config, nested):
        (tmp_path / "config.json").write_text(json.dumps(written))
        engine, worker, *_ = needs_of(tmp_path, [read_manifest(tiny_bank_folder)], Settings())
        assert 7 * GIB < engine < 7.5 * GIB  # the weights, 1 GiB of cache, 2 to compute in
        assert worker == (64 // bits + 1) * GIB + max(2, 16 // bits) * GIB
