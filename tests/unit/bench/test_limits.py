"""What a model needs for a step, against numbers counted on a real model."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from adapters.training.trainer import linear_modules
from bank.manifest import read_manifest
from bench.rig.limits import BF16_BYTES, Model


def test_a_step_reads_weights_cache_each_adapter_and_a_shared_a_once(
    tiny_model_folder: Path, tiny_bank_folder: Path
) -> None:
    shape, layout = Model.read(tiny_model_folder), read_manifest(tiny_bank_folder).layout
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    assert shape.weights == sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    manifest = read_manifest(tiny_bank_folder)
    alone, one, two = (shape.step_bytes(10, n, manifest) for n in (0, 1, 2))
    assert alone == shape.step_bytes(10)
    assert one - alone == (layout.a_numbers + layout.b_numbers) * BF16_BYTES
    assert two - one == layout.b_numbers * BF16_BYTES
    assert shape.step_bytes(7) - shape.step_bytes(0) == 7 * 2 * 2 * 2 * 32 * BF16_BYTES  # K and V, layers, heads, size


def test_a_prompt_passes_each_layer_and_the_head_once(tiny_model_folder: Path, tiny_bank_folder: Path) -> None:
    shape, manifest = Model.read(tiny_model_folder), read_manifest(tiny_bank_folder)
    body = sum(m.h_in * m.h_out for m in linear_modules(AutoModelForCausalLM.from_pretrained(tiny_model_folder)))
    attention = 4 * 2 * 2 * 32 * 50**2 // 2  # two products of 2 operations, layers, heads, size, half of it masked
    assert shape.prompt_flops(50) == 2 * body * 50 + attention + 2 * (shape.weights - body)
    adapter = 2 * 50 * (manifest.layout.a_numbers + manifest.layout.b_numbers)
    assert shape.prompt_flops(50, manifest) - shape.prompt_flops(50) == adapter
