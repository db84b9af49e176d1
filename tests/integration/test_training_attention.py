"""Attention in blocks against the plain one: losses, gradients, and answers from a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.lora import LoraWeights
from adapters.training.attached import attached
from adapters.training.example import Example
from adapters.training.forward import packing
from adapters.training.forward.attention import Block, use_quick_attention
from adapters.training.loss import backward, read
from adapters.training.trainer import initial_lora, linear_modules
from bank.items.prompt import encode_pair


@pytest.fixture(scope="module")
def plain(tiny_model_folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32, attn_implementation="eager")


@pytest.fixture(scope="module")
def quick(tiny_model_folder: Path) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32, attn_implementation="eager")
    use_quick_attention(model)
    assert model.config._attn_implementation != "eager"
    return model


@pytest.fixture(scope="module")
def models(plain: Any, quick: Any) -> tuple[Any, Any]:
    return plain, quick


@pytest.fixture(scope="module")
def examples(tiny_model_folder: Path) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    return [encode_pair(tokenizer, "hi" * n, f"hello {n}", 200) for n in (1, 9, 3, 30, 2, 17)]


def gradient(model: Any, examples: list[Example]) -> torch.Tensor:
    start = initial_lora(linear_modules(model), 4, seed=0)
    start = LoraWeights(4, start.a, {name: torch.full_like(b, 1e-2) for name, b in start.b.items()})
    with attached(model, start) as here:
        moving = here.trainable(train_a=True)
        backward(here.model, examples)
        return torch.cat([parameter.grad.reshape(-1) for parameter in moving if parameter.grad is not None])


@pytest.mark.parametrize(("size", "count"), [(size, count) for size in (1, 5, 16, 1000) for count in (1, 6)])
def test_blocks_of_any_size_give_what_plain_attention_gives(
    monkeypatch: pytest.MonkeyPatch, models: tuple[Any, Any], examples: list[Example], *, size: int, count: int
) -> None:
    plain, quick = models
    blocks = packing.Row.blocks
    monkeypatch.setattr(packing.Row, "blocks", lambda row: blocks(row, size))
    taken = examples[:count]
    expected, found = read(plain, taken), read(quick, taken)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]
    of_plain, of_quick = gradient(plain, taken), gradient(quick, taken)
    assert torch.allclose(of_quick, of_plain, rtol=1e-4, atol=1e-5 * float(of_plain.abs().max()))
    assert float(of_plain.abs().max()) > 0


def test_what_a_block_does_not_see_is_left_out(
    monkeypatch: pytest.MonkeyPatch, quick: Any, examples: list[Example]
) -> None:
    """Blocks that claim to see too little change the losses: they are what is computed."""
    expected = [loss for loss, _ in read(quick, examples)]
    blocks = packing.Row.blocks

    def blind(row: packing.Row) -> list[Any]:
        return [Block(b.first, b.last, 0, b.first, b.last) for b in blocks(row, 8)]

    monkeypatch.setattr(packing.Row, "blocks", blind)
    assert [loss for loss, _ in read(quick, examples)] != pytest.approx(expected, rel=1e-3)


def test_answers_are_those_of_plain_attention(plain: Any, quick: Any, examples: list[Example]) -> None:
    """They come id by id, with keys of ids that are no longer read, and padding on the left."""
    prompts = [example.ids[: example.loss_from] for example in examples[:3]]
    width = max(len(prompt) for prompt in prompts)
    asked = {
        "input_ids": torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }
    expected, found = (
        model.generate(**asked, max_new_tokens=8, do_sample=False, pad_token_id=0) for model in (plain, quick)
    )
    assert torch.equal(found, expected)


def eager_attention_forward(module: Any, query: Any, key: Any, value: Any) -> Any:
    """What a model of this module means by attention: something of its own."""


class Other:
    """A model of this module."""

    def set_attn_implementation(self, name: str) -> None:
        raise AssertionError(name)


def test_a_model_that_attends_in_another_way_keeps_it() -> None:
    use_quick_attention(Other())
