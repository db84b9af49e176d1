"""Training a LoRA: loss, attention and lower layers against plain ones, what moves, the model left as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters.errors import FusionError
from adapters.lora import LoraWeights
from adapters.training.adapt_config import AdaptConfig
from adapters.training.attached import attached
from adapters.training.example import Example
from adapters.training.forward import lower_layers
from adapters.training.forward.attention import Block, use_quick_attention
from adapters.training.forward.lower_layers import LowerLayers, layer_of, upper_half
from adapters.training.forward.packing import Row, pack
from adapters.training.loss import backward, mean_loss, row_losses, score
from adapters.training.trainer import StepReport, TrainPlan, initial_lora, linear_modules, train_lora
from adapters.training.user_trainer import UserRun, user_run

PLAN = TrainPlan(steps=6, batch_size=4, learning_rate=1e-2, seed=0)


@pytest.fixture(scope="module")
def quick(tiny_model_folder: Path) -> Any:
    """The same with attention in blocks."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32, attn_implementation="eager")
    use_quick_attention(model)
    assert model.config._attn_implementation != "eager"
    return model


@pytest.fixture(scope="module")
def examples(encode: Callable[[str, str], Example]) -> list[Example]:
    return [encode("hi" * n, f"hello {n}") for n in (1, 9, 3, 30, 2, 17)]


def snapshot(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def plain_loss(model: Any, example: Example) -> float:
    """Summed negative log-likelihood of the output tokens, one sequence, no padding, all logits."""
    ids = torch.tensor([example.ids])
    logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return -float(logits.gather(1, ids[0, 1:, None])[example.loss_from - 1 :].sum())


def losses_of(model: Any, row: Row) -> list[float]:
    """Summed negative log-likelihood of each example of a row."""
    logits = model(**row.inputs(model), use_cache=False).logits[0].log_softmax(-1)
    tokens = -logits.gather(1, torch.tensor(row.targets)[:, None])[:, 0]
    return [float(part.sum()) for part in tokens.split(row.counts)]


def gradient(model: Any, batch: list[Example], frozen: LoraWeights | None = None) -> torch.Tensor:
    """Of the mean loss per output token."""
    start = initial_lora(linear_modules(model), 4, seed=0)
    start = LoraWeights(4, start.a, {name: torch.full_like(b, 1e-2) for name, b in start.b.items()})
    with attached(model, start, frozen) as here:
        moving = here.trainable(train_a=True)
        backward(here.model, batch)
        return torch.cat([parameter.grad.reshape(-1) for parameter in moving if parameter.grad is not None])


@torch.no_grad()
def test_examples_packed_into_rows_have_the_losses_they_have_alone(model: Any, examples: list[Example]) -> None:
    alone = [plain_loss(model, example) for example in examples]
    counts = [example.output_tokens for example in examples]
    each = [loss / count for loss, count in zip(alone, counts, strict=True)]
    assert len(pack(model, examples)) == 1
    for limit in (10_000, 120, 1):
        losses = [loss for row in pack(model, examples, limit) for loss in losses_of(model, row)]
        assert losses == pytest.approx(alone, rel=1e-5)
    assert [loss for loss, _ in score(model, examples)] == pytest.approx(each, rel=1e-5)
    assert mean_loss(model, examples) == pytest.approx(sum(alone) / sum(counts), rel=1e-5)


def test_the_gradient_of_a_packed_row_is_that_of_its_examples(model: Any, examples: list[Example]) -> None:
    total = sum(example.output_tokens for example in examples)
    packed = gradient(model, examples)
    alone = torch.stack([gradient(model, [example]) * example.output_tokens / total for example in examples]).sum(0)
    assert torch.allclose(packed, alone, rtol=1e-4, atol=1e-6 * float(alone.abs().max()))
    assert float(alone.abs().max()) > 0


def test_beside_a_frozen_lora_a_model_learns_as_if_its_weights_held_it(
    model: Any, fused: LoraWeights, examples: list[Example]
) -> None:
    before, alone, beside = snapshot(model), gradient(model, examples), gradient(model, examples, fused)
    with torch.no_grad():
        for name in fused.a:
            model.get_submodule(name).weight += fused.delta(name)
    inside = gradient(model, examples)
    model.load_state_dict(before)
    scale = float(inside.abs().max())
    assert torch.allclose(beside, inside, rtol=1e-3, atol=1e-4 * scale)
    assert not torch.allclose(beside, alone, rtol=1e-1, atol=1e-1 * scale)


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(model: Any, examples: list[Example]) -> None:
    before, names = snapshot(model), [name for name, _ in model.named_modules()]
    reports: list[StepReport] = []
    plan = TrainPlan(steps=20, batch_size=6, learning_rate=1e-2, seed=0)
    trained = train_lora(
        model, examples, plan, start=initial_lora(linear_modules(model), 4, seed=0), on_step=reports.append
    )
    assert [report.step for report in reports] == list(range(1, 21))
    assert reports[-1].loss < 0.7 * reports[0].loss
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for name in trained.a:  # the weights that came back are those whose loss was reported
            model.get_submodule(name).weight += trained.delta(name)
        dense = sum(plain_loss(model, example) for example in examples) / sum(e.output_tokens for e in examples)
        model.load_state_dict(before)
    assert dense < reports[-1].loss * 1.05


def test_b_alone_moves_when_a_is_frozen(model: Any, examples: list[Example]) -> None:
    start = initial_lora(linear_modules(model), 4, seed=0)
    trained = train_lora(model, examples, PLAN, start=start, train_a=False)
    assert all(torch.equal(trained.a[name], start.a[name]) for name in start.a)
    assert all(not torch.equal(trained.b[name], start.b[name]) for name in start.b)
    both = train_lora(model, examples, PLAN, start=start)
    assert all(not torch.equal(both.a[name], start.a[name]) for name in start.a)


def test_the_same_plan_gives_the_same_weights_whatever_the_global_seed(model: Any, examples: list[Example]) -> None:
    start = initial_lora(linear_modules(model), 4, seed=0)
    torch.manual_seed(1)
    one = train_lora(model, examples, PLAN, start=start)
    torch.manual_seed(2)
    two = train_lora(model, examples, PLAN, start=start)
    assert all(torch.equal(one.b[name], two.b[name]) for name in start.b)
    other = train_lora(model, examples, TrainPlan(6, 4, 1e-2, seed=1), start=start)
    assert any(not torch.equal(one.b[name], other.b[name]) for name in start.b)


def test_all_linear_layers_but_the_head_are_adapted_unless_told(model: Any) -> None:
    kinds = {module.name.rsplit(".", 1)[-1] for module in linear_modules(model)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {m.name.rsplit(".", 1)[-1] for m in linear_modules(model, ("q_proj", "v_proj"))} == {"q_proj", "v_proj"}
    with pytest.raises(FusionError, match=r"no linear modules \['query'\]; it has .*q_proj"):
        linear_modules(model, ("q_proj", "query"))


def test_nothing_to_train_on_is_refused(model: Any) -> None:
    with pytest.raises(FusionError, match="nothing to train on"):
        train_lora(model, [], PLAN, start=initial_lora(linear_modules(model), 4, seed=0))


@pytest.mark.parametrize(("size", "count"), [(1, 6), (5, 1), (5, 6), (16, 6), (1000, 6)])
def test_blocks_of_any_size_give_what_plain_attention_gives(
    monkeypatch: pytest.MonkeyPatch, model: Any, quick: Any, examples: list[Example], *, size: int, count: int
) -> None:
    blocks = Row.blocks
    monkeypatch.setattr(Row, "blocks", lambda row: blocks(row, size))
    taken = examples[:count]
    expected, found = score(model, taken), score(quick, taken)
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], rel=1e-5)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]
    of_plain, of_quick = gradient(model, taken), gradient(quick, taken)
    assert torch.allclose(of_quick, of_plain, rtol=1e-4, atol=1e-5 * float(of_plain.abs().max()))
    assert float(of_plain.abs().max()) > 0


def test_what_a_block_does_not_see_is_left_out(
    monkeypatch: pytest.MonkeyPatch, quick: Any, examples: list[Example]
) -> None:
    """Blocks that claim to see too little change the losses: they are what is computed."""
    expected = [loss for loss, _ in score(quick, examples)]
    blocks = Row.blocks

    def blind(row: Row) -> list[Any]:
        return [Block(b.first, b.last, 0, b.first, b.last) for b in blocks(row, 8)]

    monkeypatch.setattr(Row, "blocks", blind)
    assert [loss for loss, _ in score(quick, examples)] != pytest.approx(expected, rel=1e-3)


def test_answers_are_those_of_plain_attention(model: Any, quick: Any, examples: list[Example]) -> None:
    """They come id by id, with keys of ids that are no longer read, and padding on the left."""
    prompts = [example.ids[: example.loss_from] for example in examples[:3]]
    width = max(len(prompt) for prompt in prompts)
    asked = {
        "input_ids": torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }
    expected, found = (
        reader.generate(**asked, max_new_tokens=8, do_sample=False, pad_token_id=0) for reader in (model, quick)
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


def moved(here: UserRun, seed: int) -> None:
    """Put some weights on a user adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in here.parameters:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def gradient_of(here: UserRun, batch: list[Example], below: LowerLayers | None) -> torch.Tensor:
    for parameter in here.parameters:
        parameter.grad = None
    backward(here.lora.model, batch, below)
    return torch.cat([parameter.grad.reshape(-1) for parameter in here.parameters if parameter.grad is not None])


def test_losses_and_gradients_are_those_of_the_whole_model_however_examples_are_packed(
    quick: Any, fused: LoraWeights, examples: list[Example]
) -> None:
    with user_run(quick, fused, AdaptConfig(rank=2)) as here:
        assert here.below is not None
        for seed, batch in enumerate((examples, examples[2:5], [examples[4], examples[0]], examples[3:4])):
            moved(here, seed)  # what is kept must not depend on what moves
            whole, upper = (gradient_of(here, batch, below) for below in (None, here.below))
            assert torch.allclose(upper, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
            assert float(whole.abs().max()) > 0
            expected = list(row_losses(quick, batch))
            assert list(row_losses(quick, batch, here.below)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("limit", [0, 100, 100_000])
def test_lower_layers_run_once_for_an_example_as_far_as_there_is_room(
    monkeypatch: pytest.MonkeyPatch, quick: Any, fused: LoraWeights, examples: list[Example], limit: int
) -> None:
    monkeypatch.setattr(lower_layers, "MAX_IDS", limit)
    read = {0: 0, 1: 0}

    def count(layer: int, states: torch.Tensor) -> None:
        read[layer] += states.shape[1]

    with user_run(quick, fused, AdaptConfig(rank=2)) as here:
        hooks = [
            quick.model.layers[layer].mlp.register_forward_pre_hook(lambda _, args, layer=layer: count(layer, args[0]))
            for layer in read
        ]
        try:
            for _ in range(3):
                list(row_losses(quick, examples, here.below))
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
    quick: Any, fused: LoraWeights, examples: list[Example]
) -> None:
    before = list(row_losses(quick, examples))
    with user_run(quick, fused, AdaptConfig(rank=2)) as here:
        moved(here, 0)
        backward(here.lora.model, examples, here.below)
        made = here.weights()
    assert set(made.a) == set(fused.a)
    for name in made.a:
        assert bool(made.delta(name).any()) == (layer_of(name) >= 1), name
    assert list(row_losses(quick, examples)) == before
    assert all("forward" not in vars(layer) for layer in quick.model.layers)


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


def test_the_upper_half_of_a_llama_is_found(quick: Any, fused: LoraWeights) -> None:
    assert upper_half(quick, fused.a) == ("model.layers", 1)
