"""A worker's jobs: wrong content, a store that is away or loses answers, and how many tokens training reads."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pytest
import torch

from adapters.errors import TrainingError
from adapters.fusion import fuse
from adapters.lora import LoraWeights
from adapters.recipe import FusionRecipe, Term
from adapters.training.adapt_config import MAX_FOLDED, AdaptConfig
from adapters.training.attached import attached
from adapters.training.example import Acts, Example
from adapters.training.forward.shared_part import SharedPart
from adapters.training.loss import mean_loss
from adapters.training.trainer import initial_lora
from adapters.training.user_trainer import IN_USE, MIN_JUDGES, Judgement
from adapters.user_adapter import UserAdapter
from bank.items.profile import Item
from bank.items.prompt import encode_conversation
from bank.lookup.serving import ServingBank
from bank.lookup.signature import empty_signature
from bank.manifest import BankManifest, LossDifference
from bench.rig.processes import PATIENCE_S, wait_until
from bench.rig.valkey import ValkeyProcess
from server.errors import Unavailable
from server.store.adapters import StoredAdapter
from server.store.feedback import Feedback, Outcome
from server.store.jobs import MAX_TRIES, JobId, JobState, JobStore
from server.store.redis import keys
from server.store.redis.servers.connection import RedisConnection
from server.store.samples import Sample
from server.worker.loops import JobLoop
from server.worker.process import work_forever
from server.worker.training import AdapterTrainer, JobUser
from tests.integration.conftest import Interrupted
from tests.support.desk import CONFIG, SAMPLES, Desk

FEW_STEPS = AdaptConfig(steps=2, learning_rate=1e-6)  # too few steps to be ended early
ALTERNATING = (
    "{% for message in messages %}{% if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
)


def shaky(name: str) -> Any:
    """A store call that may fail, or whose answer may be lost."""
    whole = getattr(JobStore, name)

    async def call(jobs: Shaky, *args: Any, **kwargs: Any) -> Any:
        answer = None if jobs.away else await whole(jobs, *args, **kwargs)
        if jobs.away or name in jobs.lost:
            jobs.lost.discard(name)
            jobs.failures += 1
            if jobs.silent:
                await asyncio.Event().wait()
            raise Unavailable("the store cannot be used now")
        return answer

    return call


class Shaky(JobStore):
    """Real jobs, some of whose answers do not arrive."""

    def __init__(self, connection: RedisConnection) -> None:
        super().__init__(connection)
        self.away = False  # while true, nothing reaches the store
        self.lost = set[str]()  # calls whose next answer is lost after the store has done its work
        self.silent = False  # whether a lost answer is silence rather than an error
        self.failures = 0

    renew, claim, samples = shaky("renew"), shaky("claim"), shaky("samples")
    end, promote, release = shaky("end"), shaky("promote"), shaky("release")


@pytest.fixture
def worker(desk: Desk, trainer: AdapterTrainer, tiny_bank_folder: Path) -> JobLoop:
    bank = ServingBank.open(tiny_bank_folder, trainer.manifest.embedder.id)
    return JobLoop(Shaky(desk.connection), desk.profiles, desk.feedback, desk.adapters, bank=bank, trainer=trainer)


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lease", "loops"):
        monkeypatch.setattr(f"server.worker.{module}.LEASE_S", 0.5)
    monkeypatch.setattr("server.worker.lease.RENEW_S", 0.05)


@pytest.fixture
def slow(short_lease: None, worker: JobLoop) -> JobLoop:
    """A worker whose store goes away at the first step, and whose training outlasts its lease."""
    leave = partial(setattr, worker.jobs, "away", True)
    worker.trainer = Interrupted(worker.trainer, leave, lambda step: time.sleep(0.1))
    return worker


async def test_a_store_that_restarts_within_the_lease_costs_no_training(
    desk: Desk, worker: JobLoop, store: ValkeyProcess, caplog: pytest.LogCaptureFixture
) -> None:
    steps: list[int] = []

    def restart() -> None:
        store.kill()
        wait_until(lambda: any(record.levelname == "WARNING" for record in caplog.records), "a renewal to fail")
        store.start()

    worker.trainer = Interrupted(worker.trainer, restart, steps.append)
    job_id = await desk.submit()
    assert await worker.work_once(1)
    job = await desk.job(job_id)
    assert (job.state, job.tries, steps.count(1)) == (JobState.SUCCEEDED, 1, 1)


async def test_a_lease_that_expires_without_the_store_costs_no_try(
    desk: Desk, slow: JobLoop, trainer: AdapterTrainer
) -> None:
    job_id, jobs = await desk.submit(), slow.jobs
    assert await slow.work_once(1)  # and does not wait for the store, to return the job
    assert not slow.model_lock.locked()
    jobs.away = False
    await asyncio.gather(*slow.releasing)
    job = await desk.job(job_id)
    assert (job.state, job.tries, job.step) == (JobState.QUEUED, 0, 0)
    slow.trainer = trainer
    assert await slow.work_once(1)
    job = await desk.job(job_id)
    assert (job.state, job.tries) == (JobState.SUCCEEDED, 1)


@pytest.mark.usefixtures("short_lease")
async def test_a_job_that_cannot_be_claimed_is_left_to_later(desk: Desk, worker: JobLoop) -> None:
    job_id, worker.jobs.away = await desk.submit(), True
    async with asyncio.timeout(PATIENCE_S):
        assert await worker.work_once(1)
    job = await desk.job(job_id)
    assert (job.state, job.tries) == (JobState.QUEUED, 0)


async def test_a_try_counts_if_another_worker_has_the_job_by_then(desk: Desk, slow: JobLoop) -> None:
    job_id, jobs = await desk.submit(), slow.jobs
    working = asyncio.create_task(slow.work_once(1))
    while jobs.failures == 0 or (lease := await desk.jobs.claim(job_id, 60)) is None:
        await asyncio.sleep(0.05)
    assert await working
    jobs.away = False
    await asyncio.gather(*slow.releasing)
    job = await desk.job(job_id)
    assert (job.state, job.tries) == (JobState.RUNNING, 2)
    assert await desk.jobs.renew(lease, 60, step=1, of=2)


@pytest.mark.parametrize(
    ("call", "silent"),
    [*((call, False) for call in ("claim", "samples", "renew", "promote", "end")), ("claim", True), ("renew", True)],
)
async def test_a_lost_answer_changes_nothing(
    desk: Desk, worker: JobLoop, monkeypatch: pytest.MonkeyPatch, call: str, silent: bool
) -> None:
    monkeypatch.setattr("server.worker.lease.RENEW_S", 0.05)
    monkeypatch.setattr("server.worker.lease.STORE_TIMEOUT_S", 0.5 if silent else 4.0)
    jobs = worker.jobs
    jobs.lost, jobs.silent = {call}, silent
    job_id = await desk.submit(SAMPLES if call != "end" else [b"{"])
    assert await worker.work_once(1)
    assert jobs.failures == 1
    job, adapter = await desk.job(job_id), await desk.adapters.adapter_id(job_id.user_key)
    assert (job.state, job.tries) == (JobState.FAILED if call == "end" else JobState.SUCCEEDED, 1)
    assert (adapter or "") == job.adapter


@pytest.mark.usefixtures("short_lease")
async def test_an_unreadable_job_holds_up_no_other_and_fails_after_the_last_try(
    desk: Desk, worker: JobLoop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.store.queue.GRACE_MS", 0)
    broken, behind = await desk.submit(), await desk.submit()

    async def of_broken(call: str, *arguments: str) -> Any:
        return await desk.connection.run(lambda redis: getattr(redis, call)(keys.job(*broken), *arguments))

    await of_broken("hset", "curve", "{")
    working = asyncio.create_task(work_forever(worker.work_once))
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not (await desk.job(behind)).state.ended:
                await asyncio.sleep(0.05)
            while (state := await of_broken("hget", "state")) == b"running":
                await asyncio.sleep(0.05)
    finally:
        working.cancel()
    assert ((await desk.job(behind)).state, state) == (JobState.SUCCEEDED, b"failed")
    said = [record.message for record in caplog.records if record.message.startswith(f"{broken}: cannot be read")]
    assert len(said) == MAX_TRIES


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
    desk: Desk, worker: JobLoop, monkeypatch: pytest.MonkeyPatch, raw: bytes, reason: str
) -> None:
    monkeypatch.setattr(worker.trainer.tokenizer, "chat_template", ALTERNATING)
    await check_fails(desk, worker, await desk.submit([*SAMPLES, raw]), "samples.8", reason)


@pytest.mark.parametrize(
    ("text", "reason"),
    [  # what is not read by `decode_config`
        (config(flavour=1), "flavour"),
        (config(strength="half"), "strength"),
        (config(max_seconds="long"), "configuration"),
    ],
)
async def test_a_wrong_configuration_fails_its_job(desk: Desk, worker: JobLoop, text: str, reason: str) -> None:
    await check_fails(desk, worker, await desk.submit(SAMPLES, text), reason)


@pytest.mark.parametrize(("text", "ids", "reason"), [("<|user|>odd", [10_000], "id 10000"), ("odd", [], "no token")])
async def test_a_tokenizer_that_does_not_fit_the_model_fails_the_job(
    desk: Desk, worker: JobLoop, monkeypatch: pytest.MonkeyPatch, *, text: str, ids: list[int], reason: str
) -> None:
    tokenizer, encode = worker.trainer.tokenizer, worker.trainer.tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda t, **how: ids if t.startswith(text) else encode(t, **how))
    await check_fails(desk, worker, await desk.submit([*SAMPLES, sample(turn("odd"), "odd")]), "samples.8", reason)


async def test_a_damaged_record_fails_its_job_and_the_next_is_trained(desk: Desk, worker: JobLoop) -> None:
    bad, good = await desk.submit(), await desk.submit()
    await desk.connection.run(lambda redis: redis.set(f"mta:{{{bad.user_key}}}:profile", b"\xff"))
    await check_fails(desk, worker, bad, "record")
    assert await worker.work_once(1)
    assert (await desk.job(good)).state is JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("where", "trouble", "state"),
    [
        ("encode_conversation", MemoryError(), JobState.FAILED),
        ("train_user", None, JobState.FAILED),
        ("train_user", torch.OutOfMemoryError("CUDA out of memory"), JobState.FAILED),
        ("train_user", RuntimeError("CUDA error: an illegal memory access"), JobState.QUEUED),
    ],
)
async def test_a_lack_of_memory_ends_the_job_and_another_fault_the_process(
    desk: Desk, worker: JobLoop, monkeypatch: pytest.MonkeyPatch, where: str, *, trouble: Any, state: JobState
) -> None:
    """What a failed job held is free by then; without a trouble the allocator's own is met."""
    made, end = list[weakref.ref[torch.Tensor]](), worker.jobs.end

    def broken(*_: object, **__: object) -> None:
        tensor = torch.zeros(1)
        made.append(weakref.ref(tensor))
        if trouble is None:
            torch.empty(1 << 50)
        raise trouble

    async def ending(*args: Any, **options: Any) -> bool:
        assert made[0]() is None
        return bool(await end(*args, **options))

    monkeypatch.setattr(f"server.worker.training.{where}", broken)
    monkeypatch.setattr(worker.jobs, "end", ending)
    job_id = await desk.submit()
    with nullcontext() if state is JobState.FAILED else pytest.raises(RuntimeError):
        await worker.work_once(0.1)
    job = await desk.job(job_id)
    assert (job.state, job.tries, "out of memory" in job.error) == (state, 1, state is JobState.FAILED)


def test_warming_up_changes_nothing(trainer: AdapterTrainer) -> None:
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    example = Example((1, 2, 3, 4), 2)
    loss = mean_loss(trainer.model, [example])
    trainer.warm_up()
    assert {name for name, _ in trainer.model.named_parameters()} <= set(before)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())
    assert mean_loss(trainer.model, [example]) == loss


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
def test_a_job_reads_about_as_many_tokens_as_estimated_and_never_more(
    trainer: AdapterTrainer, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    samples, promoted = some(count), Judgement(None, steps=FEW_STEPS.steps)
    monkeypatch.setattr("adapters.training.user_trainer.judge", lambda folds: promoted)
    encoded = trainer.encoded(person_of(trainer).recipe(None, 1), zero_weights(trainer), [])
    in_use = StoredAdapter("a", "", "", encoded)
    assert 0.8 * estimate(trainer, samples) < ids_read(trainer, samples, in_use=in_use) <= estimate(trainer, samples)


def zero_weights(trainer: AdapterTrainer) -> LoraWeights:
    return initial_lora(trainer.manifest.layout.modules, 1, seed=0)


def test_what_was_sent_instead_of_answers_is_trained_on_the_newest_first_within_the_budget(
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


def test_both_adapters_are_judged_on_the_new_recipe_and_the_one_in_use_on_its_own_too(
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
def test_answers_without_and_with_an_adapter_are_shown_wherever_it_acts(trainer: AdapterTrainer, acts: Acts) -> None:
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


async def test_a_job_trains_on_what_was_sent_instead_of_answers_and_has_the_items_where_the_bank_knows_history(
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
