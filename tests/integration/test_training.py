"""Training on a tiny model in float32: rows and user adapters help, are judged, and leave the model as it was."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3Config

from adapters.errors import FusionError, TrainingError
from adapters.flat import lora_of
from adapters.lora import LoraWeights, RowLayout
from adapters.training import user_trainer
from adapters.training.adapt_config import MAX_FOLDED, AdaptConfig
from adapters.training.attached import attached, half_without
from adapters.training.example import Example
from adapters.training.forward import lower_layers
from adapters.training.forward.attention import Block, use_quick_attention
from adapters.training.forward.lower_layers import LowerLayers, layer_of, upper_half
from adapters.training.forward.packing import Row, pack
from adapters.training.loss import b_gradient, backward, mean_loss, row_losses, score, token_losses
from adapters.training.trainer import StepReport, TrainPlan, initial_lora, linear_modules, train_lora
from adapters.training.user_trainer import (
    IN_USE,
    MIN_JUDGES,
    Beneath,
    BeneathWithout,
    Judgement,
    TrainingProgress,
    TrainingRun,
    UserRun,
    _Fold,
    judge,
    train_user,
    user_run,
)
from adapters.user_adapter import UserAdapter, encode_user_adapter, stack
from bank.items.prompt import encode_pair

PLAN = TrainPlan(steps=6, batch_size=4, learning_rate=1e-2, seed=0)
CONFIG = AdaptConfig(rank=2, steps=8, learning_rate=2e-2, holdout=0.2, seed=0)
MANY = MAX_FOLDED + 5  # of which some are trained on in both folds
START = TrainingProgress(0, 0, 0.0)


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
def test_examples_packed_into_rows_have_the_losses_they_have_alone(model: Any, examples: list[Example]) -> None:
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


def test_all_linear_layers_but_the_head_are_adapted_unless_told_and_nothing_to_train_is_refused(model: Any) -> None:
    kinds = {module.name.rsplit(".", 1)[-1] for module in linear_modules(model)}
    assert kinds == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert {m.name.rsplit(".", 1)[-1] for m in linear_modules(model, ("q_proj", "v_proj"))} == {"q_proj", "v_proj"}
    with pytest.raises(FusionError, match=r"no linear modules \['query'\]; it has .*q_proj"):
        linear_modules(model, ("q_proj", "query"))
    with pytest.raises(FusionError, match="nothing to train on"):
        train_lora(model, [], PLAN, start=initial_lora(linear_modules(model), 4, seed=0))


def test_of_a_model_that_sees_the_language_model_alone_is_adapted() -> None:
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


def test_memory_of_a_backward_pass_grows_with_the_length_and_not_its_square(quick: Any) -> None:
    kept = dict.fromkeys((1024, 2048), 0)
    for length in kept:

        def note(tensor: torch.Tensor, length: int = length) -> torch.Tensor:
            kept[length] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            gradient(quick, [Example((1,) * length, length - 8)])
    assert kept[2048] < 2.2 * kept[1024]


def test_answers_id_by_id_after_padding_on_the_left_are_those_of_plain_attention(
    model: Any, quick: Any, examples: list[Example]
) -> None:
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
def test_lower_layers_run_once_for_an_example_as_far_as_there_is_room(
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


@pytest.fixture(scope="module")
def mannered(encode: Any) -> Callable[..., list[Example]]:
    ends = (" yes yes yes", " yes yes yes yes yes yes yes yes yes")  # samples are of different lengths
    return lambda count, first=0: [
        encode(f"question {n}", f"{n}{ends[n % 3 == 1]}") for n in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def samples(mannered: Callable[..., list[Example]]) -> list[Example]:
    return mannered(10)


@pytest.fixture(scope="module")
def fluent(model: Any, fused: LoraWeights, samples: list[Example]) -> LoraWeights:
    """A fused adapter that speaks their manner already."""
    return train_lora(model, samples, TrainPlan(steps=60, batch_size=10, learning_rate=2e-2, seed=0), start=fused)


def steps(training: TrainingRun) -> Iterator[TrainingProgress]:
    """Where training is after every step; signs of life in between are left out."""
    step = 0
    for progress in training:
        if progress.step > step:
            step = progress.step
            yield progress


def on(fused: LoraWeights, **rivals: LoraWeights | None) -> BeneathWithout:
    everybody = {"merged": fused} | rivals
    return lambda held: Beneath(fused, {name: partial(lambda lora: lora, lora) for name, lora in everybody.items()})


def loss_with(model: Any, lora: LoraWeights, samples: Sequence[Example]) -> float:
    with attached(model, lora) as here:
        return mean_loss(here.model, samples)


def stacked(fused: LoraWeights, judgement: Judgement) -> LoraWeights:
    """The adapter as it would be served, in float32."""
    assert judgement.weights is not None
    return stack(fused, UserAdapter("", judgement.weights), torch.float32)


def test_what_is_learnt_shows_when_it_is_served_and_the_model_is_left_as_it_was(
    model: Any, fused: LoraWeights, samples: list[Example], mannered: Callable[..., list[Example]]
) -> None:
    before = snapshot(model)
    judgement = train_user(model, on(fused), samples, CONFIG).finish()
    assert judgement.before and judgement.after and judgement.after < judgement.before
    later = mannered(6, 10)
    assert loss_with(model, stacked(fused, judgement), later) < loss_with(model, fused, later)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("rival", ["the merged adapter", "the common row", IN_USE])
def test_an_adapter_worse_than_what_is_served_is_not_promoted(
    model: Any, fused: LoraWeights, fluent: LoraWeights, samples: list[Example], rival: str
) -> None:
    """It lowers the loss of what it is trained on, which nobody is served."""
    judgement = train_user(model, on(fused, **{rival: fluent}), samples, replace(CONFIG, steps=2)).finish()
    assert judgement.weights is None
    assert rival in judgement.reason
    assert judgement.before == pytest.approx(loss_with(model, fluent, samples), rel=1e-4)
    assert judgement.served == (judgement.before if rival == IN_USE else None)
    assert judgement.before < judgement.after < loss_with(model, fused, samples)  # type: ignore[operator]


@pytest.mark.parametrize("count", [1, MIN_JUDGES - 1])
def test_samples_too_few_to_judge_train_and_promote_nothing(
    model: Any, fused: LoraWeights, samples: list[Example], count: int
) -> None:
    training = train_user(model, on(fused), samples[:count], CONFIG)
    assert list(training) == []
    assert training.judgement
    assert (training.judgement.weights, training.judgement.after) == (None, None)
    assert f"at least {MIN_JUDGES}" in training.judgement.reason


def test_what_judges_trains_no_adapter_and_is_no_evidence_beneath(
    model: Any, fused: LoraWeights, mannered: Callable[..., list[Example]], monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, asked, trained = mannered(MANY), list[set[int]](), list[set[Example]]()
    optimise = user_trainer.optimise

    def beneath(held: Sequence[int]) -> Beneath:
        asked.append(set(held))
        return Beneath(fused, {"merged": lambda: fused})

    def noted(model: Any, parameters: Any, kept: Sequence[Example], *args: Any, **more: Any) -> Any:
        trained.append(set(kept))
        return optimise(model, parameters, kept, *args, **more)

    monkeypatch.setattr(user_trainer, "optimise", noted)
    train_user(model, beneath, samples, CONFIG, judges=range(9, MANY)).finish()
    one, other, everybody = asked
    assert (len(one), len(other), everybody) == (8, 8, set())
    assert not one & other and one | other == set(range(9, MANY))
    assert trained == [{samples[n] for n in range(MANY) if n not in held} for held in asked]


def test_the_other_folds_samples_choose_the_steps_that_count() -> None:
    """Each fold's own best step would have looked better than it is."""
    one = _Fold([1, 1], {2: [1.0, 1.0], 4: [3.0, 3.0]}, {"merged": [2.0, 2.0]})
    other = _Fold([1, 1], {2: [3.0, 3.0], 4: [1.0, 1.0]}, {"merged": [2.0, 2.0]})
    judgement = judge([one, other])
    assert (judgement.before, judgement.after) == (2.0, 3.0)
    assert judgement.reason


@pytest.mark.parametrize(("gains", "is_sure"), [([1.0, 1.0, 1.0, 1.2], True), ([4.0, -2.0, 3.0, -3.0], False)])
def test_a_gain_must_exceed_its_standard_error(gains: list[float], is_sure: bool) -> None:
    folds = [_Fold([1, 1], {1: [5.0 - gain for gain in part]}, {"m": [5.0, 5.0]}) for part in (gains[:2], gains[2:])]
    assert (judge(folds).reason == "") is is_sure


@pytest.mark.parametrize("times", [1, 3])  # all are judges, or a part
def test_what_lowers_no_loss_is_rejected(model: Any, fluent: LoraWeights, samples: list[Example], times: int) -> None:
    """The rate is one that can only spoil what is fluent."""
    judgement = train_user(model, on(fluent), samples * times, replace(CONFIG, learning_rate=0.1)).finish()
    assert judgement.weights is None
    assert judgement.before and judgement.after and judgement.after >= judgement.before


@pytest.mark.parametrize("count", [MIN_JUDGES, 10, MANY])
def test_the_same_job_twice_gives_the_same_bytes_and_progress_counts_steps_and_shows_life_between(
    model: Any, fused: LoraWeights, mannered: Callable[..., list[Example]], count: int
) -> None:
    layout, raw = RowLayout(linear_modules(model), 4, shared_a=True), []
    for _ in range(2):
        training = train_user(model, on(fused), mannered(count), replace(CONFIG, steps=4))
        told = list(training)
        assert training.judgement and training.judgement.weights
        raw.append(encode_user_adapter(layout, UserAdapter("", training.judgement.weights)))
        torch.rand(3)  # global randomness plays no part
    assert raw[0] == raw[1]
    jumps = [later.step - earlier.step for earlier, later in pairwise(told)]
    assert told[0].step == 0 and set(jumps) == {0, 1}
    assert 0 in jumps[jumps.index(1) :]  # while held-out samples are read
    assert all(progress.step <= progress.of for progress in told if progress.step)
    assert told[-1].step == told[-1].of


@pytest.mark.parametrize("count", [10, MANY])
def test_training_ends_when_the_loss_stops_falling(model: Any, fused: LoraWeights, encode: Any, count: int) -> None:
    """What is to be learnt has no pattern, so that every further step only learns by heart."""
    chance = random.Random(0)
    samples = [encode(f"question {n}", "".join(chance.choices("abcdefgh", k=12))) for n in range(count)]
    long = replace(CONFIG, steps=200, learning_rate=0.05)
    training = train_user(model, on(fused), samples, long)
    told = list(steps(training))
    assert 0 < len(told) < 200
    assert told[-1].step <= told[-1].of


@pytest.mark.parametrize("step", [0, 1])  # after a row that was read before the first step, or after that step
@pytest.mark.parametrize("count", [10, MANY])
def test_training_that_is_left_or_interrupted_ends_there_and_detaches(
    model: Any, fused: LoraWeights, mannered: Callable[..., list[Example]], count: int, step: int
) -> None:
    names = modules_of(model)
    for error in (None, KeyError):
        training = train_user(model, on(fused), mannered(count), CONFIG)
        with suppress(KeyError):
            for progress in islice(training, 1, None):  # nothing is attached during the signature
                if progress.step == step:
                    assert modules_of(model) != names
                    if error:
                        raise error
                    break
        assert progress.step == step
        assert training.judgement is None
        assert modules_of(model) == names


@pytest.mark.parametrize("count", [10, MANY])
def test_a_run_that_is_put_aside_for_signatures_trains_the_same_bytes(
    quick: Any, fused: LoraWeights, mannered: Callable[..., list[Example]], count: int
) -> None:
    layout, raw = RowLayout(linear_modules(quick), 4, shared_a=True), []
    common = initial_lora(layout.modules, 4, seed=1)
    alone = b_gradient(quick, layout, common, mannered(3))
    for is_interrupted in (False, True):
        training = train_user(quick, on(fused), mannered(count), replace(CONFIG, steps=4))
        for _ in training:
            assert not is_interrupted or torch.equal(b_gradient(quick, layout, common, mannered(3)), alone)
        assert training.judgement and training.judgement.weights
        raw.append(encode_user_adapter(layout, UserAdapter("", training.judgement.weights)))
    assert raw[0] == raw[1]
    assert torch.equal(b_gradient(quick, layout, common, mannered(3)), alone)


def test_numbers_that_explode_or_are_none_are_an_error_with_the_step(
    model: Any, fused: LoraWeights, fluent: LoraWeights, samples: list[Example]
) -> None:
    with pytest.raises(TrainingError, match=r"training diverged: the loss is .* lower the learning rate"):
        train_user(model, on(fluent), samples, replace(CONFIG, learning_rate=50.0)).finish()
    broken = replace(fused, b={name: b * float("inf") for name, b in fused.b.items()})
    with pytest.raises(TrainingError, match="the loss is nan at step 1: lower"):
        train_user(model, on(broken), samples, CONFIG).finish()
    training = train_user(model, on(fused), samples, CONFIG)  # of the last run, on all samples, no loss is taken
    with pytest.raises(TrainingError, match="the weights are not finite after the last step"):
        for progress in steps(training):
            if progress.step == progress.of:
                with torch.no_grad():
                    for parameter in (p for p in model.parameters() if p.requires_grad):
                        parameter.fill_(torch.nan)


def test_what_makes_no_training_is_refused_and_names_the_value(model: Any, fused: LoraWeights) -> None:
    with pytest.raises(TrainingError, match="no samples"):
        train_user(model, on(fused), [], CONFIG)
