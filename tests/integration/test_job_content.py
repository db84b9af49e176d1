"""A job's content: what is wrong with it fails that job alone, with the reason; and how many tokens it reads."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from adapters.recipe import FusionRecipe, Term
from adapters.training.adapt_config import MAX_FOLDED, AdaptConfig
from adapters.training.example import Example
from adapters.training.loss import mean_loss
from bank.items.profile import Item
from bank.items.prompt import encode_conversation
from bank.lookup.serving import ServingBank
from bank.manifest import BankManifest
from server.store.jobs import JobId, JobState
from server.store.samples import Sample
from server.worker.loops import JobLoop
from server.worker.training import AdapterTrainer
from tests.support.desk import CONFIG, SAMPLES, Desk

FEW_STEPS = AdaptConfig(steps=2, learning_rate=1e-6)  # too few steps to be ended early
ALTERNATING = (
    "{% for message in messages %}{% if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
)


@pytest.fixture
def worker(desk: Desk, trainer: AdapterTrainer, tiny_bank_folder: Path) -> JobLoop:
    bank = ServingBank.open(tiny_bank_folder, trainer.manifest.embedder.id)
    return JobLoop(desk.jobs, desk.profiles, bank, trainer)


def sample(messages: object, output: object = "yes") -> bytes:
    return orjson.dumps({"messages": messages, "output": output})


def turn(content: object) -> list[dict[str, object]]:
    return [{"role": "user", "content": content}]


def config(**changes: object) -> str:
    return orjson.dumps(orjson.loads(CONFIG) | changes).decode()


async def check_fails(desk: Desk, worker: JobLoop, job_id: JobId, *reasons: str) -> None:
    """Check that a job fails at its first try, with these words in its error."""
    assert await worker.work_once(1)
    job = await desk.job(job_id)
    assert (job.state, job.tries) == (JobState.FAILED, 1)
    assert [reason for reason in reasons if reason not in job.error] == []


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (sample([{"role": "system", "content": "Be brief."}, *turn("hi")]), "Conversation roles must"),
        (b"{", ""),
        (b"{}", ""),
        (sample("hi"), ""),
        (sample(turn({"image": 1}), {"text": 1}), ""),
    ],
)
async def test_a_sample_that_cannot_be_encoded_fails_its_job_and_is_named(
    desk: Desk, worker: JobLoop, trainer: AdapterTrainer, monkeypatch: pytest.MonkeyPatch, *, raw: bytes, reason: str
) -> None:
    monkeypatch.setattr(trainer.tokenizer, "chat_template", ALTERNATING)
    await check_fails(desk, worker, await desk.submit([*SAMPLES, raw]), "samples.8", reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [  # what is not read by `decode_config`
        (config(flavour=1), "flavour"),
        (config(strength="half"), "configuration"),
        (config(max_seconds="long"), "configuration"),
    ],
)
async def test_a_wrong_configuration_fails_its_job(desk: Desk, worker: JobLoop, text: str, reason: str) -> None:
    await check_fails(desk, worker, await desk.submit(SAMPLES, text), reason)


@pytest.mark.parametrize(("text", "ids", "reason"), [("<|user|>odd", [10_000], "id 10000"), ("odd", [], "no token")])
async def test_a_tokenizer_that_does_not_fit_the_model_fails_the_job(
    desk: Desk, worker: JobLoop, trainer: AdapterTrainer, monkeypatch: pytest.MonkeyPatch, *, text: str,
    ids: list[int], reason: str,
) -> None:  # fmt: skip
    encode = trainer.tokenizer.encode
    monkeypatch.setattr(trainer.tokenizer, "encode", lambda t, **how: ids if t.startswith(text) else encode(t, **how))
    await check_fails(desk, worker, await desk.submit([*SAMPLES, sample(turn("odd"), "odd")]), "samples.8", reason)


async def test_a_damaged_record_fails_its_job_and_the_next_is_trained(desk: Desk, worker: JobLoop) -> None:
    bad, good = await desk.submit(), await desk.submit()
    await desk.connection.run(lambda redis: redis.set(f"mta:{{{bad.user_key}}}:profile", b"\xff"))
    await check_fails(desk, worker, bad, "record")
    assert await worker.work_once(1)
    assert (await desk.job(good)).state is JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("where", "trouble"),
    [
        ("encode_conversation", MemoryError()),
        ("train_user", MemoryError()),
        ("train_user", RuntimeError("CUDA error: an illegal memory access")),
    ],
)
async def test_a_fault_of_the_process_ends_it_and_gives_the_job_back_once_memory_is_freed(
    desk: Desk, worker: JobLoop, monkeypatch: pytest.MonkeyPatch, where: str, trouble: Exception
) -> None:
    made, release = list[weakref.ref[torch.Tensor]](), desk.jobs.release

    def broken(*_: object, **__: object) -> None:
        tensor = torch.zeros(1)
        made.append(weakref.ref(tensor))
        raise trouble

    async def released(*args: Any, **options: Any) -> bool:
        assert made[0]() is None
        return await release(*args, **options)

    monkeypatch.setattr(f"server.worker.training.{where}", broken)
    monkeypatch.setattr(desk.jobs, "release", released)
    job_id = await desk.submit()
    with pytest.raises(type(trouble)):
        await worker.work_once(0.1)
    job = await desk.job(job_id)
    assert (job.state, job.tries) == (JobState.QUEUED, 1)


def test_warming_up_changes_nothing(trainer: AdapterTrainer) -> None:
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    example = Example((1, 2, 3, 4), 2)
    loss = mean_loss(trainer.model, [example])
    trainer.warm_up()
    assert {name for name, _ in trainer.model.named_parameters()} <= set(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert mean_loss(trainer.model, [example]) == loss


def some(count: int) -> list[Sample]:
    return [
        Sample([{"role": "user", "content": f"{n:02d}?"}], f"{n:02d} yes, that is number {n:02d}") for n in range(count)
    ]


def lengths_of(trainer: AdapterTrainer, samples: list[Sample]) -> list[int]:
    return [len(encode_conversation(trainer.tokenizer, list(s.messages), s.output).ids) for s in samples]


def ids_read(
    trainer: AdapterTrainer, samples: list[Sample], config: AdaptConfig = FEW_STEPS, items: list[Item] | None = None
) -> int:
    """How many token ids the model reads while a job trains."""
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


@pytest.mark.parametrize("count", [1, 3, MAX_FOLDED + 1])
def test_a_job_reads_about_as_many_tokens_as_estimated_and_never_more(trainer: AdapterTrainer, count: int) -> None:
    samples = some(count)
    said = FEW_STEPS.tokens_read(lengths_of(trainer, samples))
    assert 0.8 * said < ids_read(trainer, samples) <= said


def test_past_items_stand_before_samples_within_the_token_budget(trainer: AdapterTrainer) -> None:
    samples, past = some(4), [Item(f"{n}", {"input": f"past {n}?", "output": f"it is past {n}"}) for n in range(6)]
    knows = BankManifest.model_copy(trainer.manifest, update={"training": {"history_share": 1.0}})
    knowing = AdapterTrainer(knows, trainer.matrix, trainer.model, trainer.tokenizer)
    plain = ids_read(trainer, samples)
    least = FEW_STEPS.tokens_read(lengths_of(trainer, samples))
    free, none = (ids_read(knowing, samples, replace(FEW_STEPS, max_tokens=most), past) for most in (10**6, least))
    some_room = (plain + free) // 2
    assert (
        none == plain < ids_read(knowing, samples, replace(FEW_STEPS, max_tokens=some_room), past) <= some_room < free
    )
