"""How many tokens a job is said to read, against the training that reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapters.recipe import FusionRecipe, Term
from adapters.training.user_trainer import FEW, FOLDS
from bank.items.prompt import encode_conversation
from server.gateway.users import job_budget
from server.gateway.users.job_budget import tokens_read
from server.store.samples import AdaptConfig, Sample
from server.worker.training import BATCH_SIZE, LOOK_EVERY, AdapterTrainer


def test_gateway_and_worker_train_by_the_same_numbers() -> None:
    ours = (job_budget.BATCH_SIZE, job_budget.LOOK_EVERY, job_budget.FOLDS, job_budget.FEW)
    assert ours == (BATCH_SIZE, LOOK_EVERY, FOLDS, FEW)


@pytest.mark.parametrize("count", [1, 3, FEW + 1])
def test_a_job_reads_about_as_much_as_it_is_said_to_and_never_more(trainer: AdapterTrainer, count: int) -> None:
    samples = [
        Sample([{"role": "user", "content": f"{n:02d}?"}], f"{n:02d} yes, that is number {n:02d}") for n in range(count)
    ]
    manifest = trainer.manifest
    recipe = FusionRecipe(manifest.short, manifest.method, manifest.common, (Term(0, 600), Term(3, 400)))
    config = AdaptConfig(steps=2, learning_rate=1e-6)  # too few steps to be ended early
    read = 0

    def count_ids(module: Any, positional: Any, named: dict[str, torch.Tensor]) -> None:
        nonlocal read
        read += named["input_ids"].numel()

    hook = trainer.model.register_forward_pre_hook(count_ids, with_kwargs=True)
    try:
        trainer.train(recipe, samples, config).finish()
    finally:
        hook.remove()
    lengths = [len(encode_conversation(trainer.tokenizer, list(s.messages), s.output).ids) for s in samples]
    assert 0.8 * tokens_read(config, lengths) < read <= tokens_read(config, lengths)
