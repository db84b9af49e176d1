"""The worker's loop: claim a job, hold its lease while it trains, and write the outcome, once.

A worker whose lease has run out writes nothing more, and another takes the job. A fault of the job's content ends the
job; a fault of the process ends the process and counts as one of the job's tries; a fault of the store is waited out
and costs no try.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

from adapters.errors import MtaError, TrainingError
from adapters.recipe import FusionRecipe
from adapters.training.adapt_config import AdaptConfig
from adapters.training.user_trainer import Judgement, TrainingRun
from bank.items.profile import Item
from bank.lookup.serving import ServingBank
from server.errors import ApiError, Unavailable
from server.store.adapters import StoredAdapter, new_adapter_id
from server.store.jobs import JobId, JobState, JobStore, Lease, Trained
from server.store.profile_record import AdapterNote
from server.store.profiles import ProfileStore
from server.store.samples import Sample, decode_config, decode_sample
from server.watching.logs import traceparent
from server.watching.tracing import Tracing
from server.worker.lease import LEASE_S, HeldLease, LeaseLost, StoreSilent, retry_until_answered
from server.worker.metrics import GIVEN_UP, UNWANTED, WorkerMetrics
from server.worker.training import CONFIG_REMEDY, SAMPLE_REMEDY, blamed
from server.worker.training_thread import train_holding

log = logging.getLogger("mta.worker")

PROMOTE_ATTEMPTS = 20


class Trains(Protocol):
    """The part of `server.worker.training.AdapterTrainer` that is used here."""

    def train(
        self, recipe: FusionRecipe, samples: Sequence[Sample], config: AdaptConfig, items: Sequence[Item]
    ) -> TrainingRun: ...

    def encoded(self, recipe: FusionRecipe, judgement: Judgement) -> bytes: ...


class JobLoop:
    """Trains one job at a time; `model_lock` is held while the base model is in use, which others use as well."""

    def __init__(
        self,
        jobs: JobStore,
        profiles: ProfileStore,
        bank: ServingBank,
        trainer: Trains,
        *,
        model_lock: asyncio.Lock | None = None,
        metrics: WorkerMetrics | None = None,
        tracing: Tracing | None = None,
    ) -> None:
        self._jobs = jobs
        self._profiles = profiles
        self._bank = bank
        self._trainer = trainer
        self._model_lock = model_lock or asyncio.Lock()
        self._metrics = metrics or WorkerMetrics()
        self._tracing = tracing or Tracing()

    async def work_once(self, wait_s: float) -> bool:
        """Wait for a job and train it, if it still needs a worker; False when there was none."""
        job_id = await self._jobs.next_job(self._bank.manifest.short, wait_s)
        if job_id is None:
            return False
        async with self._model_lock:
            await self._claim(job_id)
        return True

    async def _claim(self, job_id: JobId) -> None:
        """Claim a job and train it, if it still needs a worker."""
        since_s = time.monotonic()
        try:
            lease = await retry_until_answered(self._jobs.claim, job_id, LEASE_S, secrets.token_hex(16))
        except Unavailable as error:
            log.error("%s: cannot be read, which is a try: %s", job_id, error.explained)
            return  # its lease runs out
        if lease is None:
            return
        log.info("%s: training, try %d", lease.job.id, lease.job.tries)
        outcome: str = GIVEN_UP
        try:
            with self._metrics.training(lease.job), self._tracing.span("adapt", follows=lease.job.traceparent):
                traceparent.set(self._tracing.current())
                outcome = await self._work(HeldLease(self._jobs, lease, since_s))
                self._tracing.note(outcome=outcome, tries=lease.job.tries)
        except LeaseLost:
            outcome = UNWANTED
            log.info("%s: given up, the lease is lost", lease.job.id)
        except StoreSilent as error:
            log.warning("%s: given up, the lease ran out without the store: %s", lease.job.id, error)
            # Another worker may have taken it by the time the store answers: then it still counts as a try.
            if await retry_until_answered(self._jobs.release, lease, counts=False):
                log.info("%s: returned to the queue", lease.job.id)
        except asyncio.CancelledError:
            await self._give_back(lease, counts=False)
            raise
        except Exception:
            await self._give_back(lease, counts=True)
            raise
        finally:
            traceparent.set("")
            self._metrics.jobs.labels(outcome).inc()

    async def _give_back(self, lease: Lease, *, counts: bool) -> None:
        """The worker is ending: let another take the job at once. Without a store, its lease runs out."""
        try:
            if await self._jobs.release(lease, counts=counts):
                log.info("%s: returned to the queue", lease.job.id)
        except ApiError as error:
            log.warning("%s: not returned to the queue: %s", lease.job.id, error.explained)

    async def _work(self, held: HeldLease) -> JobState:
        """Train a job and write its outcome; a fault of its content is an outcome too."""
        try:
            return await self._adapt(held)
        except ApiError:
            raise
        except MtaError as error:
            log.info("%s: failed: %s", held.lease.job.id, type(error.__cause__ or error).__name__)
            await self._end(held, Trained(JobState.FAILED, error=str(error)))
            return JobState.FAILED

    async def _adapt(self, held: HeldLease) -> JobState:
        lease, key = held.lease, held.lease.job.id.user_key
        profile = await held.retry(self._profiles.load, key)
        if profile is None:
            raise TrainingError("the user no longer has a profile: create one with PUT /users/{id}/profile")
        profile = profile.seen_by(self._bank.manifest.embedder.id)
        if profile is None:
            raise TrainingError("the user's profile was made with another embedder: submit the job again")
        with blamed("the job's configuration", CONFIG_REMEDY):
            config = decode_config(lease.job.config)
            most_s = float(config.max_seconds)
            recipe = self._bank.personalise(profile.embedding, profile.evidence, config.strength).recipe
        samples = []
        for place, raw in enumerate(await held.retry(self._jobs.samples, key)):
            with blamed(f"samples.{place}", SAMPLE_REMEDY):
                samples.append(decode_sample(raw))
        items = await self._past(held) if self._bank.manifest.history_share else []
        with self._tracing.span("train"):
            judgement = await train_holding(held, most_s, partial(self._trainer.train, recipe, samples, config, items))
            self._tracing.note(samples=len(samples), steps=judgement.steps)
        if judgement.weights is None:
            await self._end(held, Trained(JobState.REJECTED, judgement.before, judgement.after))
        else:
            raw = await asyncio.to_thread(self._trainer.encoded, recipe, judgement)
            if not await self._promote(held, recipe, judgement, raw):
                raise LeaseLost
        log.info("%s: held-out loss %.4f, before %.4f", lease.job.id, judgement.after, judgement.before)
        return JobState.REJECTED if judgement.weights is None else JobState.SUCCEEDED

    async def _past(self, held: HeldLease) -> list[Item]:
        """The user's items, the oldest first."""
        snapshot = await held.retry(self._profiles.read, held.lease.job.id.user_key)
        return [Item(name, stored.fields) for name, stored in snapshot.items.items()]

    async def _end(self, held: HeldLease, trained: Trained) -> None:
        """Write an outcome without an adapter."""
        if not await held.retry(self._jobs.end, held.lease, trained):
            raise LeaseLost

    async def _promote(self, held: HeldLease, recipe: FusionRecipe, judgement: Judgement, raw: bytes) -> bool:
        """Write adapter and outcome in one step; tries again when the user's record changed meanwhile."""
        lease = held.lease
        stored = StoredAdapter(new_adapter_id(), recipe.name, hashlib.sha256(raw).hexdigest(), raw)
        trained = Trained(JobState.SUCCEEDED, judgement.before, judgement.after)
        for _ in range(PROMOTE_ATTEMPTS):
            snapshot = await held.retry(self._profiles.read, lease.job.id.user_key)
            if snapshot.profile is None:
                return False
            created_ms = time.time_ns() // 1_000_000
            note = AdapterNote(stored.id, recipe.name, len(raw), created_ms, self._tracing.current())
            noted = replace(snapshot.profile, adapter=note)
            if await held.retry(self._jobs.promote, lease, trained, noted, snapshot.version, stored):
                return True
            job = await held.retry(self._jobs.job, lease.job.id)
            if job is None or job.state.ended:
                return job is not None and job.adapter == stored.id  # done, and only the answer was lost
        return False
