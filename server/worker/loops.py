"""The worker's loops: one trains jobs, one makes signatures of users whose items have changed.

A fault of the job's content ends the job; a fault of the process ends the process and counts as one of the job's tries;
a fault of the store is waited out and costs no try. A worker whose lease has run out writes nothing more.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import mmap
import secrets
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from adapters.errors import MtaError, TrainingError
from adapters.recipe import FusionRecipe
from adapters.training.user_trainer import Judgement
from bank.items.profile import Item, item_pair
from bank.lookup.serving import ServingBank
from bank.lookup.signature import MAX_ITEMS, Signature, empty_signature
from server.errors import ApiError, UserErased
from server.store.adapters import StoredAdapter, new_adapter_id
from server.store.jobs import JobId, JobState, JobStore, Lease, Trained
from server.store.profile_record import AdapterNote, StoredSignature
from server.store.profiles import Change, ProfileStore
from server.store.queue import UserQueue
from server.store.samples import decode_config, decode_sample
from server.watching.logs import traceparent
from server.watching.tracing import Tracing
from server.worker.lease import (
    LEASE_S,
    STALL_S,
    HeldLease,
    LeaseLost,
    Stalled,
    StoreSilent,
    retry_until,
    train_holding,
)
from server.worker.metrics import GIVEN_UP, UNWANTED, WorkerMetrics
from server.worker.training import CONFIG_REMEDY, SAMPLE_REMEDY, AdapterTrainer, blamed

log = logging.getLogger("mta.worker")

ATTEMPTS = 20  # how often a write is repeated after the user's record has changed meanwhile
MAX_SIGN_TRIES = 3  # how many workers may die over one user's items; after that they get an empty signature
RESERVE_BYTES = 16 << 20  # address space, given up to hand a job back without memory; untouched, it costs none


@dataclass
class JobLoop:
    """Claims a job, holds its lease while it trains, and writes the outcome, once.

    `model_lock` is held meanwhile: training and signing take turns at the base model.
    """

    jobs: JobStore
    profiles: ProfileStore
    bank: ServingBank
    trainer: AdapterTrainer
    model_lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)
    tracing: Tracing = field(default_factory=Tracing)

    def __post_init__(self) -> None:
        self._reserve = mmap.mmap(-1, RESERVE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    async def work_once(self, wait_s: float) -> bool:
        """Wait for a job and train it, if it still needs a worker; False when there was none."""
        job_id = await self.jobs.next_job(self.bank.manifest.short, wait_s)
        if job_id is None:
            return False
        async with self.model_lock:
            await self._claim(job_id)
        return True

    async def _claim(self, job_id: JobId) -> None:
        """Claim a job and train it, if it still needs a worker."""
        since_s = time.monotonic()
        try:
            lease = await retry_until(math.inf, self.jobs.claim, job_id, LEASE_S, secrets.token_hex(16))
        except TrainingError as error:
            log.error("%s: cannot be read, which is a try: %s", job_id, error)
            return  # its lease runs out
        if lease is None:
            return
        log.info("%s: training, try %d", lease.job.id, lease.job.tries)
        outcome: str = GIVEN_UP
        try:
            with self.metrics.training(lease.job), self.tracing.span("adapt", follows=lease.job.traceparent):
                traceparent.set(self.tracing.current())
                outcome = await self._work(HeldLease(self.jobs, lease, since_s))
                self.tracing.note(outcome=outcome, tries=lease.job.tries)
        except LeaseLost:
            outcome = UNWANTED
            log.info("%s: given up, the lease is lost", lease.job.id)
        except StoreSilent as error:
            log.warning("%s: given up, the lease ran out without the store: %s", lease.job.id, error)
            # Another worker may have taken it by the time the store answers: then it still counts as a try.
            await self._give_back(lease, math.inf, counts=False)
        except asyncio.CancelledError:
            await self._give_back(lease, counts=False)
            raise
        except Exception as error:
            self._free_memory(error)
            await self._give_back(lease, counts=True)
            raise
        finally:
            traceparent.set("")
            self.metrics.jobs.labels(outcome).inc()

    async def _give_back(self, lease: Lease, until_s: float = 0.0, *, counts: bool) -> None:
        """Let another worker take the job at once. If the store gives no answer until then, its lease runs out."""
        try:
            if await retry_until(until_s, self.jobs.release, lease, counts=counts):
                log.info("%s: returned to the queue", lease.job.id)
        except (MtaError, StoreSilent, RuntimeError) as error:
            log.warning("%s: not returned to the queue: %s", lease.job.id, error)

    def _free_memory(self, error: BaseException | None) -> None:
        """Free what this process needs no more, so that there is memory to hand the job back: it may lack any."""
        self._reserve.close()
        while error is not None:
            traceback.clear_frames(error.__traceback__)  # they hold the training's tensors
            error = error.__cause__ or error.__context__

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
        profile = await held.retry(self.profiles.load, key)
        if profile is None:
            raise TrainingError("the user no longer has a profile: create one with PUT /users/{id}/profile")
        profile = profile.with_embedder(self.bank.manifest.embedder.id)
        if profile is None:
            raise TrainingError("the user's profile was made with another embedder: submit the job again")
        with blamed("the job's configuration", CONFIG_REMEDY):
            config = decode_config(lease.job.config)
            most_s = float(config.max_seconds)
            recipe = self.bank.personalise(profile.embedding, profile.evidence, config.strength).recipe
        samples = []
        for place, raw in enumerate(await held.retry(self.jobs.samples, key)):
            with blamed(f"samples.{place}", SAMPLE_REMEDY):
                samples.append(decode_sample(raw))
        items = []
        if self.bank.manifest.history_share:
            snapshot = await held.retry(self.profiles.read, key)
            items = [Item(name, stored.fields) for name, stored in snapshot.items.items()]  # the oldest first
        with self.tracing.span("train"):
            judgement = await train_holding(held, most_s, partial(self.trainer.train, recipe, samples, config, items))
            self.tracing.note(samples=len(samples), steps=judgement.steps)
        if judgement.weights is None:
            state = JobState.REJECTED
            await self._end(held, Trained(state, judgement.before, judgement.after))
        else:
            state = JobState.SUCCEEDED
            await self._promote(held, recipe, judgement)
        log.info("%s: held-out loss %.4f, before %.4f", lease.job.id, judgement.after, judgement.before)
        return state

    async def _end(self, held: HeldLease, trained: Trained) -> None:
        if not await held.retry(self.jobs.end, held.lease, trained):
            raise LeaseLost

    async def _promote(self, held: HeldLease, recipe: FusionRecipe, judgement: Judgement) -> None:
        """Write adapter and outcome in one step; tries again when the user's record changed meanwhile."""
        job_id = held.lease.job.id
        raw = await asyncio.to_thread(self.trainer.encoded, recipe, judgement)
        stored = StoredAdapter(new_adapter_id(), recipe.name, hashlib.sha256(raw).hexdigest(), raw)
        trained = Trained(JobState.SUCCEEDED, judgement.before, judgement.after)
        for _ in range(ATTEMPTS):
            snapshot = await held.retry(self.profiles.read, job_id.user_key)
            if snapshot.profile is None:
                break
            created_ms = time.time_ns() // 1_000_000
            note = AdapterNote(stored.id, recipe.name, len(raw), created_ms, self.tracing.current())
            noted = replace(snapshot.profile, adapter=note)
            if await held.retry(self.jobs.promote, held.lease, trained, noted, snapshot.version, stored):
                return
            job = await held.retry(self.jobs.job, job_id)
            if job is not None and job.adapter == stored.id:
                return  # only the answer was lost
            if job is None or job.state.ended:
                break
        raise LeaseLost


@dataclass
class SigningLoop:
    """Makes one signature at a time, about a second each."""

    queue: UserQueue
    profiles: ProfileStore
    bank: ServingBank
    signer: AdapterTrainer
    model_lock: asyncio.Lock
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)

    async def work_once(self, wait_s: float) -> bool:
        """Wait for a user and make their signature; returns whether there was one."""
        user_key = await self.queue.take(wait_s)
        if user_key is None:
            return False
        async with self.model_lock:
            await self._sign(user_key)
        await self.queue.remove(user_key)
        profile = await self.profiles.load(user_key)
        if profile is not None and not profile.is_signed(self.bank.manifest.short):
            await self.queue.add(user_key)  # their items changed while the queue still held them
        return True

    async def _sign(self, user_key: str) -> None:
        """Sign a user's items, unless they are signed; waiting for a store that is away is part of the same try."""
        tries = await self.queue.count_attempt(user_key)
        bank = self.bank.manifest.short
        for _ in range(ATTEMPTS):
            try:
                snapshot = await retry_until(math.inf, self.profiles.read, user_key)
                profile = snapshot.profile
                if profile is None or profile.is_signed(bank):
                    return
                items = [Item(name, stored.fields) for name, stored in snapshot.items.items()]
                pairs = [pair for item in items if (pair := item_pair(item, self.bank.task)) is not None][-MAX_ITEMS:]
                made = await self._made(user_key, pairs, tries)
                change = Change(replace(profile, signature=StoredSignature(made, profile.updated_ms)), {}, {}, ())
                commit = self.profiles.commit
                if await retry_until(math.inf, commit, user_key, snapshot.version, change, snapshot.epoch):
                    self.metrics.signatures.inc()
                    log.info("%s: signed, %d items", user_key, len(pairs))
                    return
            except UserErased:
                return
            except TrainingError as error:
                log.error("%s: cannot be signed: %s", user_key, error)
                return

    async def _made(self, user_key: str, pairs: Sequence[tuple[str, str]], tries: int) -> Signature:
        """The items' signature, an empty one where none can be made of them; Stalled when it never comes."""
        empty = empty_signature(self.bank.manifest.short, len(self.bank.manifest.anchors))
        if tries > MAX_SIGN_TRIES:
            log.error("%s: gets an empty signature: workers died over its items %d times", user_key, MAX_SIGN_TRIES)
            return empty
        making = asyncio.create_task(asyncio.to_thread(self.signer.signature, pairs))
        await asyncio.wait({making}, timeout=STALL_S)
        if not making.done():
            raise Stalled(f"{user_key}: no signature within {STALL_S:g} s; this process cannot go on")
        try:
            made = making.result()
        except MtaError as error:
            log.warning("%s: no signature: %s", user_key, type(error.__cause__ or error).__name__)
            return empty
        if pairs and not made.tokens:
            log.warning("%s: no signature: the gradient is not finite", user_key)
        return made
