"""What a worker's jobs learn from: samples, texts sent instead of answers, past items; and who judges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from adapters.errors import TrainingError
from adapters.fusion import fuse
from adapters.lora import LoraWeights
from adapters.recipe import FusionRecipe, Term
from adapters.training.adapt_config import MAX_FOLDED, AdaptConfig
from adapters.training.attached import attached
from adapters.training.example import Acts
from adapters.training.forward.shared_part import SharedPart
from adapters.training.loss import mean_loss
from adapters.training.trainer import initial_lora
from adapters.training.user_trainer import IN_USE, MIN_JUDGES, Judgement
from adapters.user_adapter import UserAdapter
from bank.items.profile import Item
from bank.items.prompt import encode_conversation
from bank.lookup.signature import empty_signature
from bank.manifest import BankManifest, LossDifference
from server.store.adapters import StoredAdapter
from server.store.feedback import Feedback, Outcome
from server.store.jobs import JobState
from server.store.samples import Sample
from server.worker.loops import JobLoop
from server.worker.training import AdapterTrainer, JobUser
from tests.support.desk import SAMPLES, Desk

FEW_STEPS = AdaptConfig(steps=2, learning_rate=1e-6)  # too few steps to be ended early


def some(count: int) -> list[Sample]:
    return [Sample([{"role": "user", "content": f"{n:02d}?"}], f"{n:02d} yes, number {n:02d}") for n in range(count)]


def person_of(trainer: AdapterTrainer, **known: Any) -> JobUser:
    manifest = trainer.manifest
    recipe = FusionRecipe(manifest.short, manifest.method, manifest.common, (Term(0, 600), Term(3, 400)))
    return JobUser(lambda signature, strength: recipe, **known)


def estimate(trainer: AdapterTrainer, samples: list[Sample]) -> int:
    examples = [encode_conversation(trainer.tokenizer, list(sample.messages), sample.output) for sample in samples]
    return FEW_STEPS.tokens_read([len(example.ids) for example in examples])


def ids_read(
    trainer: AdapterTrainer,
    samples: list[Sample],
    config: AdaptConfig = FEW_STEPS,
    learned: Sequence[Sample] = (),
    **known: Any,
) -> int:
    """How many token ids the model reads while a job trains."""
    read = 0

    def count_ids(module: Any, positional: Any, named: dict[str, torch.Tensor]) -> None:
        nonlocal read
        read += named["input_ids"].numel()

    hook = trainer.model.register_forward_pre_hook(count_ids, with_kwargs=True)
    try:
        trainer.train(person_of(trainer, **known), samples, config, learned).finish()
    finally:
        hook.remove()
    return read


@pytest.mark.parametrize("count", [MIN_JUDGES, MAX_FOLDED + 5])
def test_a_job_reads_at_most_as_many_tokens_as_estimated(
    trainer: AdapterTrainer, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    samples, promoted = some(count), Judgement(None, steps=FEW_STEPS.steps)
    monkeypatch.setattr("adapters.training.user_trainer.judge", lambda folds: promoted)
    encoded = trainer.encoded(person_of(trainer).recipe(None, 1), zero_weights(trainer), [])
    in_use = StoredAdapter("a", "", "", encoded)
    assert 0.8 * estimate(trainer, samples) < ids_read(trainer, samples, in_use=in_use) <= estimate(trainer, samples)


def zero_weights(trainer: AdapterTrainer) -> LoraWeights:
    return initial_lora(trainer.manifest.layout.modules, 1, seed=0)


def test_texts_sent_instead_train_newest_first_in_the_budget(
    trainer: AdapterTrainer,
) -> None:
    first, *others = some(9)
    whole = ids_read(trainer, [first, *others])
    assert ids_read(trainer, [first], learned=others) == ids_read(trainer, [], learned=[first, *others]) == whole
    for fit in range(MIN_JUDGES, 8):
        budget = replace(FEW_STEPS, max_tokens=estimate(trainer, [first, *others[-fit:]]))
        assert ids_read(trainer, [first], budget, others) == ids_read(trainer, [first, *others[-fit:]])
    assert ids_read(trainer, [first], learned=[others[0], first, *others]) == whole  # each is read once
    odd = Sample([{"role": "user", "content": "?"}], "word " * 5000)  # longer than the context
    assert ids_read(trainer, [first], learned=[*others, odd]) == whole
    with pytest.raises(TrainingError, match="no sample can be used"):
        ids_read(trainer, [], learned=[odd])


@pytest.mark.parametrize(("trained_on", "judges"), [(4, [4, 5, 6, 7, 8]), (6, None), (0, list(range(9)))])
def test_what_the_adapter_in_use_was_trained_on_does_not_judge(
    trainer: AdapterTrainer, monkeypatch: pytest.MonkeyPatch, trained_on: int, judges: list[int] | None
) -> None:
    """Too few others do not either: then all judge, and the adapter in use has the advantage."""
    samples, asked = some(9), list[Any]()
    recipe = person_of(trainer).recipe(None, 1)
    in_use = StoredAdapter("a", recipe.name, "", trainer.encoded(recipe, zero_weights(trainer), samples[:trained_on]))
    monkeypatch.setattr("server.worker.training.train_user", lambda *_, judges, write: asked.append(judges))
    trainer.train(person_of(trainer, in_use=in_use), samples, FEW_STEPS)
    assert asked == [judges]


def test_the_adapter_in_use_is_judged_on_both_recipes(
    trainer: AdapterTrainer,
) -> None:
    person = person_of(trainer)
    trained = UserAdapter(person.recipe(None, 1).name, zero_weights(trainer))
    found = trainer._beneath(partial(person.recipe, None), 0.5, trained)
    assert set(found.rivals) == {
        *("the merged adapter", "the base model", "the common row"),
        *(IN_USE, f"{IN_USE}, on the new recipe"),
    }


def test_the_recipe_beneath_has_not_seen_what_judges(trainer: AdapterTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(f"{n}?", f"answer {n}") for n in range(4)]
    items = [Item(f"{n}", {"input": turn, "output": output}) for n, (turn, output) in enumerate(pairs)]
    sent = [*pairs[:2], ("as the app words it", "ANSWER  3"), ("other", "other")]
    signed, grounds = list[Any](), list[Any]()
    empty = empty_signature("", 6)
    monkeypatch.setattr(trainer, "signature", lambda kept: signed.append(kept) or empty)
    monkeypatch.setattr("server.worker.training.train_user", lambda model, beneath, *_, **__: grounds.append(beneath))
    samples = [Sample([{"role": "user", "content": turn}], output) for turn, output in sent]
    trainer.train(person_of(trainer, items=items, signature=empty), samples, FEW_STEPS)
    for held in ([], [1, 2], [3]):
        grounds[0](held)
    assert signed == [[pairs[0], pairs[2]]]


@pytest.mark.parametrize("acts", list(Acts))
def test_samples_are_judged_where_the_adapters_act(trainer: AdapterTrainer, acts: Acts) -> None:
    plain = trainer.manifest.model_copy(update={"training": {"acts": acts}, "phrases": None})
    acting, samples = AdapterTrainer(plain, trainer.matrix, trainer.model, trainer.tokenizer), some(4)
    person = person_of(acting)
    judged = acting.train(person, samples, FEW_STEPS).finish()
    examples = [encode_conversation(trainer.tokenizer, list(each.messages), each.output) for each in samples]
    common, merged = (fuse(trainer.matrix, one, torch.float32) for one in (plain.common_recipe, person.recipe(None, 1)))
    losses = [mean_loss(trainer.model, examples)]
    for lora in (common, merged):
        with attached(trainer.model, lora, shared=SharedPart(acts, common)) as here:
            losses.append(mean_loss(here.model, examples))
    assert judged.before == pytest.approx(min(losses), rel=1e-5)


@pytest.mark.parametrize("acts", list(Acts))
def test_both_answers_are_shown_wherever_an_adapter_acts(trainer: AdapterTrainer, acts: Acts) -> None:
    (sample,) = some(1)
    example = encode_conversation(trainer.tokenizer, list(sample.messages), sample.output)
    recipe = person_of(trainer).recipe(None, 1)
    common, merged = (fuse(trainer.matrix, one, torch.float32) for one in (trainer.manifest.common_recipe, recipe))
    undone = LoraWeights(merged.rank, merged.a, {name: -b for name, b in merged.b.items()})
    with attached(trainer.model, merged, shared=SharedPart(acts, common)):
        nothing, moved = trainer._answers(example)
    with attached(trainer.model, undone, merged, SharedPart(acts, common)):
        assert trainer._answers(example) == (moved, nothing)
    assert nothing != moved


def test_samples_are_judged_as_answers_with_phrases_would_be(
    trainer: AdapterTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, unsure = some(4), LossDifference(mean=-0.2, low=-0.3, high=0.1)
    mine, others = (
        [Item(name, {"input": "?", "output": f"{said}{name}"}) for name in "ab"] for said in ("yes, number ", "WWWWW")
    )

    def before(items: Sequence[Item], **changed: Any) -> float:
        rule = trainer.manifest.phrases.model_copy(update=changed)
        monkeypatch.setattr(trainer, "manifest", trainer.manifest.model_copy(update={"phrases": rule}))
        judged = trainer.train(person_of(trainer, items=items), samples, FEW_STEPS).finish()
        return judged.before

    plain = before([])
    assert before(mine) < plain - 0.1
    assert before(others) > plain
    assert before(mine, gain=unsure) == pytest.approx(plain)


async def test_a_job_has_texts_sent_instead_and_items_of_history(
    desk: Desk, worker: JobLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted: list[tuple[int, list[Any]]] = []
    train, past = worker.trainer.train, ("how is the bread?", "crusty")

    def noting(person: JobUser, samples: list[Sample], config: AdaptConfig, learned: list[Sample]) -> Any:
        noted.append((len(samples) + len(learned), [tuple(item.fields.values()) for item in person.items]))
        return train(person, samples, config, learned)

    monkeypatch.setattr(worker.trainer, "train", noting)
    knows = worker.bank.manifest.model_copy(update={"training": {"history_share": 1.0}})
    monkeypatch.setattr(worker.bank, "manifest", knows)
    user_key = await desk.user(past)
    for number, sample in enumerate(some(3)):
        feedback = Feedback("merged", "none", Outcome.EDITED)
        await desk.feedback.add(user_key, f"gen-{number}", feedback, sample, "")
    job_id = await desk.submit(SAMPLES[:2], user=user_key)
    assert await worker.work_once(1)
    assert (await desk.job(job_id)).state in {JobState.SUCCEEDED, JobState.REJECTED}
    assert noted == [(5, [past])]


async def test_a_rejected_job_says_why(desk: Desk, worker: JobLoop) -> None:
    job_id = await desk.submit(SAMPLES[: MIN_JUDGES - 1])
    assert await worker.work_once(1)
    job = await desk.job(job_id)
    assert (job.state, job.tries, job.before, job.after) == (JobState.REJECTED, 1, None, None)
    assert f"at least {MIN_JUDGES}" in job.error


async def test_an_adapter_in_use_is_a_rival_of_the_next_one(desk: Desk, worker: JobLoop) -> None:
    first = await desk.submit()
    assert await worker.work_once(1)
    again = await desk.submit(SAMPLES[::-1], user=first.user_key)
    assert await worker.work_once(1)
    assert [(await desk.job(job_id)).served is not None for job_id in (first, again)] == [False, True]


def test_past_items_stand_before_samples_within_the_token_budget(trainer: AdapterTrainer) -> None:
    samples, past = some(4), [Item(f"{n}", {"input": f"past {n}?", "output": f"it is past {n}"}) for n in range(6)]
    knows = BankManifest.model_copy(trainer.manifest, update={"training": {"history_share": 1.0}})
    knowing = AdapterTrainer(knows, trainer.matrix, trainer.model, trainer.tokenizer)
    plain, least = ids_read(trainer, samples), estimate(trainer, samples)

    def read(max_tokens: int) -> int:
        return ids_read(knowing, samples, replace(FEW_STEPS, max_tokens=max_tokens), items=past)

    free, some_room = read(10**6), (least + estimate(trainer, samples) * 2) // 2
    assert read(least) == plain < read(some_room) <= min(some_room, free)
