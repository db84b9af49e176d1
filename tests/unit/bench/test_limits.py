"""What a model needs for a step, against numbers counted on a real model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.training.trainer import linear_modules
from bank.manifest import read_manifest
from bench.rig.limits import BF16_BYTES, Limits, Model


@pytest.fixture
def shape(tiny_model_folder: Path) -> Model:
    return Model.read(tiny_model_folder)


def test_weights_are_those_of_all_linear_layers(shape: Model, tiny_model_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert shape.weights == linear


def test_each_adapter_is_read_once_and_a_shared_a_once_for_all(shape: Model, tiny_bank_folder: Path) -> None:
    manifest = read_manifest(tiny_bank_folder)
    alone, one, two = (shape.step_bytes(10, n, manifest) for n in (0, 1, 2))
    assert alone == shape.step_bytes(10)
    assert one - alone == (manifest.layout.a_numbers + manifest.layout.b_numbers) * BF16_BYTES
    assert two - one == manifest.layout.b_numbers * BF16_BYTES


def test_contexts_are_read_from_the_cache(shape: Model) -> None:
    assert shape.step_bytes(7) - shape.step_bytes(0) == 7 * 2 * 2 * 2 * 32 * BF16_BYTES  # K and V, layers, heads, size


def test_a_prompt_passes_each_layer_and_the_head_once(
    shape: Model, tiny_model_folder: Path, tiny_bank_folder: Path
) -> None:
    model, manifest = AutoModelForCausalLM.from_pretrained(tiny_model_folder), read_manifest(tiny_bank_folder)
    body = sum(module.h_in * module.h_out for module in linear_modules(model))
    attention = 4 * 2 * 2 * 32 * 50**2 // 2  # two products of 2 operations, layers, heads, size, half of it masked
    assert shape.prompt_flops(50) == 2 * body * 50 + attention + 2 * (shape.weights - body)
    adapter = 2 * 50 * (manifest.layout.a_numbers + manifest.layout.b_numbers)
    assert shape.prompt_flops(50, manifest) - shape.prompt_flops(50) == adapter


def test_this_machine_is_measured_in_the_right_order_of_magnitude(shape: Model) -> None:
    limits = Limits.measured(shape, tokens=64)
    assert 1e8 < limits.bytes_per_s < 1e14
    assert 1e6 < limits.flops_per_s < 1e16
