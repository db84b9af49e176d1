"""Where the personal part of an adapter acts: losses, gradients and signatures are those of the formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapters.flat import flattened, lora_of
from adapters.lora import LoraWeights, RowLayout
from adapters.training.attached import attached
from adapters.training.example import Acts, Example
from adapters.training.forward import packing, shared_part
from adapters.training.forward.attention import use_quick_attention
from adapters.training.forward.lower_layers import LowerLayers, upper_half
from adapters.training.forward.packing import pack
from adapters.training.forward.shared_part import SharedPart
from adapters.training.loss import b_gradient, backward, row_losses
from adapters.training.trainer import initial_lora, linear_modules
from bank.items.prompt import encode_conversation

PERSONAL = [Acts.AFTER_SYSTEM, Acts.ANSWER]
TURNS = ("hi", "hi there, who are you?", "who?")


@pytest.fixture(scope="module", params=["eager", "quick"])
def model(tiny_model_folder: Path, request: pytest.FixtureRequest) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32, attn_implementation="eager")
    if request.param == "quick":
        use_quick_attention(model)
    return model


@pytest.fixture(scope="module")
def make(model: Any) -> Callable[[int], LoraWeights]:
    layout = RowLayout(linear_modules(model), 4, shared_a=True)

    def lora(seed: int) -> LoraWeights:
        chance = torch.Generator().manual_seed(seed)
        a = torch.randn(layout.a_numbers, generator=chance) * 0.2
        return lora_of(layout, a, torch.randn(layout.b_numbers, generator=chance) * 0.2)

    return lora


@pytest.fixture(scope="module")
def examples(tiny_model_folder: Path) -> list[Example]:
    """With a system prompt that two of them share, and one of a third."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    systems = ("You are kind.", "You are kind.", "You are short")
    return [
        encode_conversation(
            tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": turn}], f"it is {turn}"
        )
        for system, turn in zip(systems, TURNS, strict=True)
    ]


@contextmanager
def by_the_formula(
    model: Any, shared: LoraWeights, personal: Sequence[LoraWeights], begin: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Add x Aᵀ Bᵀ to each module's output: the shared LoRA's before token `begin`, then those of the personal ones.

    Yields the last personal LoRA's weights, which gradients are taken of.
    """
    *frozen, last = personal
    leaves = {f"a.{name}": part.clone().requires_grad_() for name, part in last.a.items()}
    leaves |= {f"b.{name}": part.clone().requires_grad_() for name, part in last.b.items()}

    def product(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return x @ a.T @ b.T

    def hook(name: str) -> Callable[..., torch.Tensor]:
        def add(_: Any, given: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
            (x,) = given
            own = product(x, leaves[f"a.{name}"], leaves[f"b.{name}"])
            own = own + sum(product(x, lora.a[name], lora.b[name]) for lora in frozen)
            early = torch.arange(x.shape[1])[:, None] < begin
            return y + torch.where(early, product(x, shared.a[name], shared.b[name]), own)

        return add

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in last.a]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()


def plain_loss(model: Any, example: Example) -> torch.Tensor:
    ids = torch.tensor([example.ids])
    logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return -logits.gather(1, ids[0, 1:, None])[example.loss_from - 1 :].sum()


def begin_of(example: Example, acts: Acts) -> int:
    return {Acts.EVERYWHERE: 0, Acts.AFTER_SYSTEM: example.system, Acts.ANSWER: example.loss_from - 1}[acts]


@pytest.mark.parametrize("acts", list(Acts))
@pytest.mark.parametrize("count", [1, 2, 3])
def test_losses_are_those_of_the_formula(
    model: Any, make: Callable[[int], LoraWeights], examples: list[Example], acts: Acts, count: int
) -> None:
    common, own, some = make(0), make(1), examples[:count]
    wanted = []
    with torch.no_grad():
        for example in some:
            with by_the_formula(model, common, [own], begin_of(example, acts)):
                wanted.append(float(plain_loss(model, example)))
    assert 0 < some[0].system < some[0].loss_from - 1
    assert len(pack(model, some)) == 1
    with attached(model, own, shared=SharedPart(acts, common)) as here:
        found = [loss for row in row_losses(here.model, some) for loss in row]
    assert found == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("acts", PERSONAL)
def test_gradients_are_those_of_the_formula(
    model: Any, make: Callable[[int], LoraWeights], examples: list[Example], acts: Acts
) -> None:
    common, ground, own = make(0), make(1), make(2)
    total, wanted = sum(example.output_tokens for example in examples), dict[str, torch.Tensor]()
    for example in examples:
        with by_the_formula(model, common, [ground, own], begin_of(example, acts)) as leaves:
            names, parts = zip(*leaves.items(), strict=True)
            grads = torch.autograd.grad(plain_loss(model, example) / total, parts)
            wanted = {name: wanted.get(name, 0) + grad for name, grad in zip(names, grads, strict=True)}
    with attached(model, own, frozen=ground, shared=SharedPart(acts, common)) as here:
        here.trainable(train_a=True)
        sum(backward(here.model, examples))
        for name, layer in here._trained.items():
            for kind, part in (("a", layer.a), ("b", layer.b)):
                right = wanted[f"{kind}.{name}"]
                assert part.grad is not None
                assert torch.allclose(part.grad, right, rtol=1e-3, atol=1e-4 * float(right.abs().max()))


@pytest.mark.parametrize("acts", PERSONAL)
def test_lower_layers_read_their_shared_tokens_alike(
    model: Any, make: Callable[[int], LoraWeights], examples: list[Example], acts: Acts
) -> None:
    half = upper_half(model, make(1).a)
    assert half
    upper = [m for m in linear_modules(model) if f".{half[1]}." in m.name]
    shared, start = SharedPart(acts, make(0)), initial_lora(upper, 2, seed=0)
    with attached(model, start, frozen=make(1), shared=shared) as here:
        here.put(replace(start, b={name: torch.full_like(b, 0.1) for name, b in start.b.items()}))
        below = LowerLayers(here.model, here.model.get_submodule(half[0]), half[1])
        whole = [loss for row in row_losses(here.model, examples) for loss in row]
        found = [loss for row in row_losses(here.model, examples, below) for loss in row]
        again = [loss for row in row_losses(here.model, examples[1:], below) for loss in row]
    assert found == pytest.approx(whole, rel=1e-5)
    assert again == pytest.approx(whole[1:], rel=1e-5)


def test_a_signature_at_the_common_row_is_of_what_acts(
    model: Any, make: Callable[[int], LoraWeights], examples: list[Example]
) -> None:
    common, layout = make(0), RowLayout(linear_modules(model), 4, shared_a=True)
    found = {acts: b_gradient(model, layout, common, examples, SharedPart(acts, common)) for acts in Acts}
    small = 1e-3 * torch.randn(layout.b_numbers, generator=torch.Generator().manual_seed(3))
    total = sum(example.output_tokens for example in examples)

    def loss(acts: Acts, sign: int) -> float:
        moved = lora_of(layout, flattened(layout, common.a), flattened(layout, common.b) + sign * small)
        with attached(model, moved, shared=SharedPart(acts, common)) as here:
            return sum(loss for row in row_losses(here.model, examples) for loss in row) / total

    for acts in Acts:
        slope = (loss(acts, 1) - loss(acts, -1)) / 2
        assert slope == pytest.approx(float(found[acts] @ small), rel=0.05, abs=1e-5)
    assert len({round(float(gradient.norm()), 6) for gradient in found.values()}) == len(Acts)


@pytest.mark.parametrize("kept_bytes", [shared_part.MAX_KEPT_BYTES, 0])
def test_what_is_shared_is_read_once_if_there_is_room(
    model: Any,
    make: Callable[[int], LoraWeights],
    examples: list[Example],
    kept_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads = list[shared_part.Prefix]()
    read = SharedPart._read

    def counted(part: SharedPart, model: Any, prefix: shared_part.Prefix) -> shared_part.KeysValues:
        reads.append(prefix)
        return read(part, model, prefix)

    monkeypatch.setattr(shared_part, "MAX_KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(SharedPart, "_read", counted)
    part = SharedPart(Acts.ANSWER, make(0))
    with attached(model, make(1), shared=part) as here:
        first, again = ([loss for row in row_losses(here.model, examples) for loss in row] for _ in range(2))
    assert again == first
    assert reads == [part.prefix(example) for example in examples] * (1 if kept_bytes else 2)


def test_rows_without_room_for_what_is_read_before_split(
    model: Any, make: Callable[[int], LoraWeights], examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    with attached(model, make(1), shared=SharedPart(Acts.ANSWER, make(0))) as here:
        (whole,) = pack(here.model, examples)
        monkeypatch.setattr(packing, "ROW_KEYS", whole.keys_before + len(whole.ids) - 1)
        assert [len(row.examples) for row in pack(here.model, examples)] == [2, 1]
        found = [loss for row in row_losses(here.model, examples) for loss in row]
        monkeypatch.undo()
        assert found == pytest.approx([loss for row in row_losses(here.model, examples) for loss in row], rel=1e-5)
