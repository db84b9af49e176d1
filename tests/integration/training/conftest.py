"""A tiny model in float32, with a fused adapter and examples."""

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
from adapters.training.forward.attention import use_quick_attention
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


@pytest.fixture(scope="module")
def quick(tiny_model_folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32, attn_implementation="eager")
    use_quick_attention(model)
    assert model.config._attn_implementation != "eager"  # attention in blocks
    return model


@pytest.fixture(scope="module")
def examples(encode: Callable[[str, str], Example]) -> list[Example]:
    return [encode("hi" * n, f"hello {n}") for n in (1, 9, 3, 30, 2, 17)]


def modules_of(model: Any) -> list[str]:
    return [name for name, _ in model.named_modules()]


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
