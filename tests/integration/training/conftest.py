"""A tiny model in float32 and an adapter for it, as a recipe would give."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.flat import lora_of
from adapters.lora import LoraWeights, RowLayout
from adapters.training.example import Example
from adapters.training.trainer import linear_modules
from bank.items.prompt import encode_pair


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def encode(tiny_model_folder: Path) -> Callable[[str, str], Example]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    return lambda turn, output: encode_pair(tokenizer, turn, output, 200)


@pytest.fixture(scope="module")
def fused(model: Any) -> LoraWeights:
    layout = RowLayout(linear_modules(model), 4, shared_a=True)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(layout.a_numbers, generator=generator) * 0.2
    return lora_of(layout, a, torch.randn(layout.b_numbers, generator=generator) * 0.2)
