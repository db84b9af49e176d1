"""What the layers below those that move make of an example: computed once, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.flat import lora_of
from adapters.lora import LoraWeights, RowLayout
from adapters.training.adapt_config import AdaptConfig
from adapters.training.example import Example
from adapters.training.forward import below as module
from adapters.training.forward.attention import use_quick_attention
from adapters.training.forward.below import layer_of, upper_half
from adapters.training.loss import backward, row_losses
from adapters.training.trainer import linear_modules
from adapters.training.user_run import UserRun, user_run
from bank.items.prompt import encode_pair


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32, attn_implementation="eager")
    use_quick_attention(loaded)
    return loaded


@pytest.fixture(scope="module")
def examples(tiny_model_folder: Path) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    return [encode_pair(tokenizer, "hi" * n, f"hello {n}", 200) for n in (1, 9, 3, 30, 2, 17)]


@pytest.fixture(scope="module")
def fused(model: Any) -> LoraWeights:
    layout = RowLayout(linear_modules(model), 4, shared_a=True)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(layout.a_numbers, generator=generator) * 0.2
    return lora_of(layout, a, torch.randn(layout.b_numbers, generator=generator) * 0.2)


def training(model: Any, fused: LoraWeights) -> Any:
    return user_run(model, fused, AdaptConfig(rank=2))


def moved(here: UserRun, seed: int) -> None:
    """Put some weights on a user adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in here.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def gradient(here: UserRun, batch: list[Example], below: module.Below | None) -> torch.Tensor:
    for parameter in here.parameters:
        parameter.grad = None
    backward(here.model, batch, below)
    return torch.cat([parameter.grad.reshape(-1) for parameter in here.parameters if parameter.grad is not None])


def test_losses_and_gradients_are_those_of_the_whole_model_however_examples_are_packed(
    model: Any, fused: LoraWeights, examples: list[Example]
) -> None:
    with training(model, fused) as here:
        assert here.below is not None
        for seed, batch in enumerate((examples, examples[2:5], [examples[4], examples[0]], examples[3:4])):
            moved(here, seed)  # what is kept must not depend on what moves
            whole, upper = (gradient(here, batch, below) for below in (None, here.below))
            assert torch.allclose(upper, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
            assert float(whole.abs().max()) > 0
            expected = list(row_losses(model, batch))
            assert list(row_losses(model, batch, here.below)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("limit", [0, 100, 100_000])
def test_lower_layers_run_once_for_an_example_as_far_as_there_is_room(
    monkeypatch: pytest.MonkeyPatch, model: Any, fused: LoraWeights, examples: list[Example], limit: int
) -> None:
    monkeypatch.setattr(module, "MAX_IDS", limit)
    read = {0: 0, 1: 0}

    def count(layer: int, states: torch.Tensor) -> None:
        read[layer] += states.shape[1]

    with training(model, fused) as here:
        hooks = [
            model.model.layers[layer].mlp.register_forward_pre_hook(lambda _, args, layer=layer: count(layer, args[0]))
            for layer in read
        ]
        try:
            for _ in range(3):
                list(row_losses(model, examples, here.below))
        finally:
            for hook in hooks:
                hook.remove()
    if limit == 0:
        assert read[0] == read[1]
    elif limit == 100:
        assert read[1] / 3 < read[0] < read[1]
    else:
        assert read[0] == read[1] / 3


def test_a_users_lora_leaves_the_lower_layers_as_they_are_and_the_model_runs_whole_again(
    model: Any, fused: LoraWeights, examples: list[Example]
) -> None:
    before = list(row_losses(model, examples))
    with training(model, fused) as here:
        moved(here, 0)
        backward(here.model, examples, here.below)
        made = here.weights()
    assert set(made.a) == set(fused.a)
    for name in made.a:
        assert bool(made.delta(name).any()) == (layer_of(name) >= 1), name
    assert list(row_losses(model, examples)) == before
    assert all("forward" not in vars(layer) for layer in model.model.layers)


class Odd(torch.nn.Module):
    """A layer that takes something from the layers before it, besides hidden states."""

    def forward(self, hidden_states: torch.Tensor, per_layer_input: torch.Tensor) -> torch.Tensor:
        return hidden_states + per_layer_input


class Plain(torch.nn.Module):
    """A layer like others."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class Many(torch.nn.Module):
    """A layer whose answer may be anything."""

    def forward(self, hidden_states):  # type: ignore[no-untyped-def]
        return (hidden_states,)


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ([Odd(), Odd()], ["layers.0.q", "layers.1.q"]),
        ([Many(), Many()], ["layers.0.q", "layers.1.q"]),
        ([Plain()], ["layers.0.q"]),
        ([Plain(), Plain()], ["layers.1.q", "layers.1.k"]),
        ([], ["layers.0.q", "other.0.q"]),
        ([], ["layers.0.q", "q"]),
    ],
)
def test_a_model_whose_upper_half_cannot_run_alone_has_none(layers: list[torch.nn.Module], names: list[str]) -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(layers)
    assert upper_half(model, names) is None


def test_the_upper_half_is_of_the_layers_that_are_adapted() -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([Plain() for _ in range(9)])
    names = [f"layers.{layer}.{module}" for layer in (1, 2, 3, 6) for module in ("q", "experts.7.up")]
    assert upper_half(model, names) == ("layers", 3)


def test_the_upper_half_of_a_llama_is_found(model: Any, fused: LoraWeights) -> None:
    assert upper_half(model, fused.a) == ("model.layers", 1)
