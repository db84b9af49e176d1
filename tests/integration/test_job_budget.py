"""How many tokens a job is said to read, against the training that reads them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from adapters.recipe import FusionRecipe, Term
from adapters.training.user_trainer import FEW, FOLDS
from bank.items.profile import Item
from bank.items.prompt import encode_conversation
from bank.manifest import BankManifest
from server.store import samples as counting
from server.store.samples import AdaptConfig, Sample, tokens_read
from server.worker.training import AdapterTrainer

CONFIG = AdaptConfig(steps=2, learning_rate=1e-6)  # too few steps to be ended early


def test_jobs_are_counted_by_the_numbers_that_training_goes_by() -> None:
    assert (counting.FOLDS, counting.FEW) == (FOLDS, FEW)


def some(count: int) -> list[Sample]:
    return [
        Sample([{"role": "user", "content": f"{n:02d}?"}], f"{n:02d} yes, that is number {n:02d}") for n in range(count)
    ]


def lengths_of(trainer: AdapterTrainer, samples: list[Sample]) -> list[int]:
    return [len(encode_conversation(trainer.tokenizer, list(s.messages), s.output).ids) for s in samples]


def ids_read(
    trainer: AdapterTrainer, samples: list[Sample], config: AdaptConfig = CONFIG, items: list[Item] | None = None
) -> int:
    """How many ids the model is given while a job trains."""
    manifest = trainer.manifest
    recipe = FusionRecipe(manifest.short, manifest.method, manifest.common, (Term(0, 600), Term(3, 400)))
    read = 0

    def count_ids(module: Any, positional: Any, named: dict[str, torch.Tensor]) -> None:
        nonlocal read
        read += named["input_ids"].numel()

    hook = trainer.model.register_forward_pre_hook(count_ids, with_kwargs=True)
    try:
        trainer.train(recipe, samples, config, items or []).finish()
    finally:
        hook.remove()
    return read


@pytest.mark.parametrize("count", [1, 3, FEW + 1])
def test_a_job_reads_about_as_much_as_it_is_said_to_and_never_more(trainer: AdapterTrainer, count: int) -> None:
    samples = some(count)
    said = tokens_read(CONFIG, lengths_of(trainer, samples))
    assert 0.8 * said < ids_read(trainer, samples) <= said


def test_past_items_stand_before_samples_only_as_far_as_the_job_may_read_them(trainer: AdapterTrainer) -> None:
    samples, past = some(4), [Item(f"{n}", {"input": f"past {n}?", "output": f"it is past {n}"}) for n in range(6)]
    knows = BankManifest.model_copy(trainer.manifest, update={"training": {"history_share": 1.0}})
    knowing = AdapterTrainer(knows, trainer.matrix, trainer.model, trainer.tokenizer)
    plain = ids_read(trainer, samples)
    least = tokens_read(CONFIG, lengths_of(trainer, samples))
    free, none = (ids_read(knowing, samples, replace(CONFIG, max_tokens=most), past) for most in (10**6, least))
    some_room = (plain + free) // 2
    assert none == plain < ids_read(knowing, samples, replace(CONFIG, max_tokens=some_room), past) <= some_room < free
