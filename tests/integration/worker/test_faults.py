"""Faults of a worker's jobs: a store that is away or loses answers, wrong content, a lack of memory."""

from __future__ import annotations

import asyncio
import time
import weakref
from contextlib import nullcontext
from functools import partial
from typing import Any

import orjson
import pytest
import torch

from adapters.training.example import Example
from adapters.training.loss import mean_loss
from bench.rig.processes import PATIENCE_S, wait_until
from bench.rig.valkey import ValkeyProcess
from server.store.jobs import MAX_TRIES, JobId, JobState
from server.store.redis import keys
from server.worker.loops import JobLoop
from server.worker.process import work_forever
from server.worker.training import AdapterTrainer
from tests.integration.conftest import Interrupted
from tests.support.desk import CONFIG, SAMPLES, Desk

ALTERNATING = (
    "{% for message in messages %}{% if message['role'] != ('assistant' if loop.index0 % 2 else 'user') %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
)


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


async def test_a_store_that_restarts_in_time_costs_no_training(
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
async def test_an_unreadable_job_fails_and_holds_up_no_other(
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
async def test_a_sample_that_cannot_be_encoded_is_named(
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
async def test_a_lack_of_memory_ends_the_job_alone(
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
