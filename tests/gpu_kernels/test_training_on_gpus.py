"""Training, judging and signing on a GPU: the same as on the CPU, and how often the host waits for it."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adapters.flat import flattened
from adapters.lora import LoraWeights, RowLayout
from adapters.matrix import MetaMatrix
from adapters.training.adapt_config import AdaptConfig
from adapters.training.attached import attached
from adapters.training.example import Acts, Example
from adapters.training.forward.packing import pack
from adapters.training.forward.shared_part import SharedPart
from adapters.training.trainer import TrainPlan, initial_lora, linear_modules, train_lora
from adapters.training.user_trainer import Beneath, Judgement, train_user
from bank.building.signer import Signer
from server.worker.training import AdapterTrainer
from tests.gpu_kernels.card import on_gpu

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
EXAMPLES = [Example((1, 2, *range(3 + place, 150 + place)), 40, system=2) for place in range(8)]
STEPS = 3
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


@cache
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, num_hidden_layers=4, **SIZES)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa").requires_grad_(False)


def lora(seed: int) -> LoraWeights:
    start, chance = initial_lora(linear_modules(model()), 4, seed=seed), torch.Generator().manual_seed(seed)
    return LoraWeights(4, start.a, {name: torch.randn(b.shape, generator=chance) / 20 for name, b in start.b.items()})


def bank() -> MetaMatrix:
    layout, common = RowLayout(linear_modules(model()), 4, shared_a=True), lora(1)
    rows = torch.stack([flattened(layout, lora(seed).b) for seed in (2, 3, 1)]).bfloat16()
    return MetaMatrix(layout, rows, 2, True, flattened(layout, common.a).bfloat16())


def test_rows_are_trained_with_one_wait_a_step() -> None:
    def trained() -> LoraWeights:
        return train_lora(model(), EXAMPLES, TrainPlan(STEPS, len(EXAMPLES), 1e-2, 0), start=lora(1))

    assert len(pack(model(), EXAMPLES)) > 1
    wanted = trained()
    with on_gpu(model()) as waits:
        found = trained()
    for name, b in wanted.b.items():
        torch.testing.assert_close(found.b[name], b, **CLOSE)
    copied = 2 * len(wanted.b)  # A and B of each module, at the end
    assert waits is None or waits == {"aten::_local_scalar_dense": STEPS, "aten::_to_copy": copied}


@pytest.mark.parametrize("acts", Acts)
def test_a_user_adapter_is_trained_and_judged(acts: Acts) -> None:
    def judged() -> Judgement:
        below = Beneath(lora(1), {"the base model": lambda: None}, shared=SharedPart(acts, lora(2)))
        return train_user(model(), lambda _: below, EXAMPLES, AdaptConfig(steps=STEPS, learning_rate=1e-2)).finish()

    wanted = judged()
    with on_gpu(model()):
        found = judged()
    assert wanted.weights
    assert found.weights
    torch.testing.assert_close((found.before, found.after), (wanted.before, wanted.after), **CLOSE)
    for name, b in wanted.weights.b.items():
        torch.testing.assert_close(found.weights.b[name], b, **CLOSE)


@pytest.mark.parametrize("acts", Acts)
def test_a_signature_comes_to_the_host_at_once(acts: Acts) -> None:
    wanted = Signer(model(), bank(), acts).signature("", EXAMPLES)
    with on_gpu(model()) as waits:
        found = Signer(model(), bank(), acts).signature("", EXAMPLES)
    torch.testing.assert_close(torch.tensor(found.products), torch.tensor(wanted.products), **CLOSE)
    assert waits is None or waits == {"aten::_to_copy": 1}


def test_the_bank_is_measured() -> None:
    def measured() -> list[torch.Tensor]:
        signer = Signer(model(), bank(), Acts.AFTER_SYSTEM)
        steps = np.eye(2, dtype=np.float32)
        chances = signer.log_chances(steps, EXAMPLES[:2])
        found = [signer.losses(steps, EXAMPLES), *signer.token_losses(steps[0], EXAMPLES), *chances]
        return [*map(torch.tensor, found)]

    wanted = measured()
    with on_gpu(model()):
        found = measured()
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("acts", Acts)
def test_both_answers_of_a_job_are_written(acts: Acts) -> None:
    tokenizer = SimpleNamespace(eos_token_id=0, batch_decode=lambda ids, **_: list(map(str, ids.cpu().tolist())))
    job: Any = SimpleNamespace(model=model(), tokenizer=tokenizer)

    def written() -> tuple[str, ...]:
        with attached(model(), lora(3), lora(1), SharedPart(acts, lora(1))):
            return AdapterTrainer._answers(job, EXAMPLES[0])

    wanted = written()
    with on_gpu(model()):
        assert written() == wanted
    assert len(set(wanted)) == 2
