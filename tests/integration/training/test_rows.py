"""Training rows on a tiny model: packed, in blocks, on the upper half of the layers, as single examples would be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3Config

from adapters.errors import FusionError
from adapters.lora import LoraWeights
from adapters.training.adapt_config import AdaptConfig
from adapters.training.attached import attached, half_without
from adapters.training.example import Example
from adapters.training.forward import lower_layers
from adapters.training.forward.attention import Block
from adapters.training.forward.lower_layers import LowerLayers, layer_of, upper_half
from adapters.training.forward.packing import Row, pack
from adapters.training.loss import backward, mean_loss, row_losses, score, token_losses
from adapters.training.trainer import StepReport, TrainPlan, initial_lora, linear_modules, train_lora
from adapters.training.user_trainer import (
    TrainingProgress,
    UserRun,
    user_run,
)
from tests.integration.training.conftest import modules_of, snapshot

PLAN = TrainPlan(steps=6, batch_size=4, learning_rate=1e-2, seed=0)
START = TrainingProgress(0, 0, 0.0)


def plain_loss(model: Any, example: Example) -> float:
    """Summed negative log-likelihood of the output tokens, one sequence, no padding, all logits."""
    ids = torch.tensor([example.ids])
    logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return -float(logits.gather(1, ids[0, 1:, None])[example.loss_from - 1 :].sum())


def assert_same(found: torch.Tensor, wanted: torch.Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Gradients are the same, but for rounding in parts of the largest, and not all zero."""
    scale = float(wanted.abs().max())
    assert scale > 0
    assert torch.allclose(found, wanted, rtol=rtol, atol=atol * scale)


def gradient(model: Any, batch: list[Example], frozen: LoraWeights | None = None) -> torch.Tensor:
    start = initial_lora(linear_modules(model), 4, seed=0)
    start = LoraWeights(4, start.a, {name: torch.full_like(b, 1e-2) for name, b in start.b.items()})
    with attached(model, start, frozen) as here:
        moving = here.trainable(train_a=True)
        sum(backward(here.model, batch))
        return torch.cat([parameter.grad.reshape(-1) for parameter in moving if parameter.grad is not None])


def test_half_of_a_batch_is_read_without_what_is_in_training(model: Any, fused: LoraWeights) -> None:
    trained = LoraWeights(4, fused.a, {name: b.flip(0) for name, b in fused.b.items()})
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad(), attached(model, fused):
        without = model(ids).logits
    with torch.no_grad(), attached(model, trained, fused):
        with_it = model(ids).logits
        with half_without(model):
            both = model(ids.repeat(2, 1)).logits
        torch.testing.assert_close(model(ids).logits, with_it)
    torch.testing.assert_close(both, torch.cat([without, with_it]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(without, with_it, atol=1e-2)


@torch.no_grad()
def test_examples_in_rows_have_the_losses_they_have_alone(model: Any, examples: list[Example]) -> None:
    alone = [plain_loss(model, example) for example in examples]
    counts = [example.output_tokens for example in examples]
    each = [loss / count for loss, count in zip(alone, counts, strict=True)]
    assert len(pack(model, examples)) == 1
    for limit in (10_000, 120, 1):
        losses: list[float] = []
        for row in pack(model, examples, limit):
            logits = model(**row.inputs(model), use_cache=False).logits[0].log_softmax(-1)
            tokens = -logits.gather(1, torch.tensor(row.targets)[:, None])[:, 0]
            losses += [float(part.sum()) for part in tokens.split(row.counts)]
        assert losses == pytest.approx(alone, rel=1e-5)
    assert [loss for loss, _ in score(model, examples)] == pytest.approx(each, rel=1e-5)
    assert read(model, examples) == pytest.approx(alone, rel=1e-5)
    assert mean_loss(model, examples) == pytest.approx(sum(alone) / sum(counts), rel=1e-5)


def test_a_mixed_token_has_the_loss_of_the_mixture(model: Any, examples: list[Example]) -> None:
    plain, served = examples[:2]
    pairs = tuple((0.75, 0.25 * (place % 2)) for place in range(served.output_tokens))
    (row,) = pack(model, [plain, replace(served, mixed=pairs)])
    found = dict(zip(row.examples, token_losses(model, row), strict=True))
    (alone,) = pack(model, [plain, served])
    before = dict(zip(alone.examples, token_losses(model, alone), strict=True))
    kept, added = torch.tensor(pairs).T
    assert torch.allclose(found[replace(served, mixed=pairs)], -(kept * (-before[served]).exp() + added).log())
    assert torch.equal(found[plain], before[plain])


def test_gradients_are_those_of_single_examples_or_dense(
    model: Any, fused: LoraWeights, examples: list[Example]
) -> None:
    total, packed = sum(example.output_tokens for example in examples), gradient(model, examples)
    alone = torch.stack([gradient(model, [example]) * example.output_tokens / total for example in examples]).sum(0)
    assert_same(packed, alone, atol=1e-6)
    before, beside = snapshot(model), gradient(model, examples, fused)
    with torch.no_grad():
        for name in fused.a:
            model.get_submodule(name).weight += fused.delta(name)
    inside = gradient(model, examples)
    model.load_state_dict(before)
    assert_same(beside, inside, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(beside, packed, rtol=1e-1, atol=1e-1 * float(inside.abs().max()))


def test_training_lowers_the_loss_and_leaves_the_model_as_it_was(model: Any, examples: list[Example]) -> None:
    before, names = snapshot(model), modules_of(model)
    reports: list[StepReport] = []
    plan = TrainPlan(steps=20, batch_size=6, learning_rate=1e-2, seed=0)
    start = initial_lora(linear_modules(model), 4, seed=0)
    trained = train_lora(model, examples, plan, start=start, on_step=reports.append)
    assert [report.step for report in reports] == list(range(1, 21))
    assert reports[-1].loss < 0.7 * reports[0].loss
    assert modules_of(model) == names
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        for name in trained.a:  # the weights that came back are those whose loss was reported
            model.get_submodule(name).weight += trained.delta(name)
        dense = sum(plain_loss(model, example) for example in examples) / sum(e.output_tokens for e in examples)
        model.load_state_dict(before)
    assert dense < reports[-1].loss * 1.05


def test_the_plan_alone_decides_the_weights_and_a_frozen_a_stays(model: Any, examples: list[Example]) -> None:
    start = initial_lora(linear_modules(model), 4, seed=0)
    frozen = train_lora(model, examples, PLAN, start=start, train_a=False)
    torch.manual_seed(1)
    one = train_lora(model, examples, PLAN, start=start)
    torch.manual_seed(2)
    two = train_lora(model, examples, PLAN, start=start)
    other = train_lora(model, examples, TrainPlan(6, 4, 1e-2, seed=1), start=start)
    for name in start.a:
        assert torch.equal(frozen.a[name], start.a[name])
        assert not torch.equal(frozen.b[name], start.b[name])
        assert not torch.equal(one.a[name], start.a[name])
        assert torch.equal(one.b[name], two.b[name])
    assert any(not torch.equal(one.b[name], other.b[name]) for name in start.b)


def test_all_linear_layers_but_the_head_are_adapted(model: Any) -> None:
    kinds = {module.name.rsplit(".", 1)[-1] for module in linear_modules(model)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {m.name.rsplit(".", 1)[-1] for m in linear_modules(model, ("q_proj", "v_proj"))} == {"q_proj", "v_proj"}
    with pytest.raises(FusionError, match=r"no linear modules \['query'\]; it has .*q_proj"):
        linear_modules(model, ("q_proj", "query"))
    with pytest.raises(FusionError, match="nothing to train on"):
        train_lora(model, [], PLAN, start=initial_lora(linear_modules(model), 4, seed=0))


def test_of_a_model_that_sees_the_language_part_is_adapted() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Gemma3Config(vision_config={"num_hidden_layers": 1}))
    assert "model.vision_tower.encoder.layers.0.mlp.fc1" in dict(model.named_modules())
    assert all(module.name.startswith("model.language_model.layers.") for module in linear_modules(model))


@pytest.mark.parametrize(("size", "count"), [(1, 6), (5, 1), (5, 6), (16, 6), (1000, 6)])
def test_blocks_of_any_size_give_what_plain_attention_gives(
    monkeypatch: pytest.MonkeyPatch, model: Any, quick: Any, examples: list[Example], *, size: int, count: int
) -> None:
    blocks = Row.blocks
    monkeypatch.setattr(Row, "blocks", lambda row: blocks(row, size))
    taken = examples[:count]
    expected, found = ([loss for loss, _ in score(reader, taken)] for reader in (model, quick))
    assert found == pytest.approx(expected, rel=1e-5)
    assert_same(gradient(quick, taken), gradient(model, taken))
    if (size, count) == (5, 6):  # blocks that claim to see too little change the losses: they are what is computed
        monkeypatch.setattr(
            Row, "blocks", lambda row: [Block(b.first, b.last, (0, 0), (b.first, b.last)) for b in blocks(row, 8)]
        )
        assert [loss for loss, _ in score(quick, taken)] != pytest.approx(expected, rel=1e-3)


def test_memory_of_a_backward_pass_is_linear_in_the_length(quick: Any) -> None:
    kept = dict.fromkeys((1024, 2048), 0)
    for length in kept:

        def note(tensor: torch.Tensor, length: int = length) -> torch.Tensor:
            kept[length] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            gradient(quick, [Example((1,) * length, length - 8)])
    assert kept[2048] < 2.2 * kept[1024]


def test_answers_after_padding_are_those_of_plain_attention(model: Any, quick: Any, examples: list[Example]) -> None:
    prompts = [example.ids[: example.loss_from] for example in examples[:3]]
    width = max(len(prompt) for prompt in prompts)
    asked = {
        "input_ids": torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
    }
    how = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(quick.generate(**asked, **how), model.generate(**asked, **how))


def read(model: Any, examples: list[Example], below: LowerLayers | None = None) -> list[float]:
    return [loss for row in row_losses(model, examples, below) for loss in row]


def gradient_of(here: UserRun, batch: list[Example], below: LowerLayers | None) -> torch.Tensor:
    for parameter in here.parameters:
        parameter.grad = None
    sum(backward(here.lora.model, batch, below))
    return torch.cat([parameter.grad.reshape(-1) for parameter in here.parameters if parameter.grad is not None])


def test_the_upper_half_learns_as_the_whole_model(quick: Any, fused: LoraWeights, examples: list[Example]) -> None:
    before = read(quick, examples)
    with user_run(quick, fused, AdaptConfig(rank=2), START) as here:
        assert here.below is not None
        assert upper_half(quick, fused.a) == ("model.layers", 1)
        for seed, batch in enumerate((examples, examples[2:5], [examples[4], examples[0]], examples[3:4])):
            torch.manual_seed(seed)
            with torch.no_grad():  # what is kept must not depend on what moves
                for parameter in here.parameters:
                    parameter.copy_(torch.randn(parameter.shape) * 0.1)
            whole, upper = (gradient_of(here, batch, below) for below in (None, here.below))
            assert_same(upper, whole)
            assert read(quick, batch, here.below) == pytest.approx(read(quick, batch), rel=1e-5)
        made = here.weights()
    assert set(made.a) == set(fused.a)
    for name in made.a:
        assert bool(made.delta(name).any()) == (layer_of(name) >= 1), name
    assert read(quick, examples) == before
    assert all("forward" not in vars(layer) for layer in quick.model.layers)


@pytest.mark.parametrize(("limit", "reads"), [(0, 3), (100, None), (100_000, 1)])
def test_lower_layers_run_once_while_there_is_room(
    monkeypatch: pytest.MonkeyPatch, quick: Any, fused: LoraWeights, examples: list[Example], *, limit: int, reads: Any
) -> None:
    monkeypatch.setattr(lower_layers, "MAX_IDS", limit)
    read = [0, 0]

    def hook(layer: int) -> Any:
        def count(_: Any, args: tuple[torch.Tensor]) -> None:
            read[layer] += args[0].shape[1]

        return quick.model.layers[layer].mlp.register_forward_pre_hook(count)

    with user_run(quick, fused, AdaptConfig(rank=2), START) as here:
        hooks = [hook(0), hook(1)]
        try:
            for _ in range(3):
                list(row_losses(quick, examples, here.below))
        finally:
            for each in hooks:
                each.remove()
    lower, upper = read
    assert lower == upper * reads / 3 if reads else upper / 3 < lower < upper
