"""The worker's loops and their metrics: one loop trains jobs, the other signs users whose items have changed.

They share the base model: between two steps of training the users who wait are signed. An error in a job's content
fails the job, as does a lack of memory in its training. Another error of the process ends the process and counts as a
try of the job. A lack of the store is not a try. It may be of some users alone: the loops go on with the others. A
worker writes nothing after its lease expires.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from adapters.errors import MtaError, TrainingError
from adapters.recipe import FusionRecipe, UserAdapterId, bank_of
from bank.items.profile import Item
from bank.lookup.serving import ServingBank
from bank.lookup.signature import Signature, empty_signature
from server.errors import ApiError, UserErased
from server.observability.background import StoreSeconds
from server.observability.logs import traceparent
from server.observability.tracing import Tracing
from server.settings import Settings
from server.store.adapters import AdapterStore, AdapterVersion, new_adapter_id
from server.store.feedback import FeedbackStore
from server.store.jobs import Job, JobId, JobState, JobStore, Lease, Trained
from server.store.profile_record import AdapterNote, StoredSignature
from server.store.profiles import Change, ProfileStore
from server.store.queue import UserQueue
from server.store.samples import decode_config, decode_sample
from server.worker.lease import (
    LEASE_S,
    HeldLease,
    LeaseLost,
    ProgressLog,
    StoreTimeout,
    on_model_thread,
    retry_until,
    train_with_lease,
    unless_stalled,
    with_lease,
)
from server.worker.training import CONFIG_REMEDY, SAMPLE_REMEDY, AdapterTrainer, JobUser, as_training_error, pairs_of

log = logging.getLogger("mta.worker")
T = TypeVar("T")

MAX_WRITE_ATTEMPTS = 20  # writes per result, when the user's record keeps changing
MAX_TURN_S = 5.0  # time after which signing lets a job do its next step
LOOK_S = 0.01  # longest wait for another user within that time
MAX_SIGN_TRIES = 3  # worker deaths per user; after that the user gets an empty signature
_BUCKETS_S = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)
GIVEN_UP = "given up"  # returned to the queue
UNWANTED = "unwanted"  # cancelled, superseded, erased, or taken by another worker


class WorkerMetrics:
    """The metrics of one worker. No label contains a user or a job."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        about = "Adapt jobs by how this worker left them."
        self.jobs = Counter("mta_worker_jobs", about, ("outcome",), registry=registry)
        for outcome in (JobState.SUCCEEDED, JobState.REJECTED, JobState.FAILED, UNWANTED, GIVEN_UP):
            self.jobs.labels(outcome)  # start at zero, so that the first job counts as an increase
        histogram = partial(Histogram, buckets=_BUCKETS_S, registry=registry)
        self.wait = histogram("mta_worker_job_wait_seconds", "From a job's request to its first try.")
        self.took = histogram("mta_worker_job_seconds", "From taking a job to its outcome.")
        self.signatures = Counter("mta_worker_signatures", "Users whose items were signed.", registry=registry)
        self.store = StoreSeconds(registry)
        self._begun_s: float | None = None
        running = Gauge("mta_worker_job_running_seconds", "How long the job in training takes.", registry=registry)
        running.set_function(lambda: 0.0 if self._begun_s is None else time.monotonic() - self._begun_s)
        ProcessCollector(registry=registry)

    def publish(self, settings: Settings) -> None:
        """Serve `/metrics` on a thread if the settings have a port. Raises MtaError if the port cannot be opened."""
        if not settings.metrics_port:
            return
        host, port = settings.inner_host, settings.metrics_port
        try:
            start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise MtaError(
                f"cannot serve metrics on {host}:{port}: {error.strerror or error}. Choose another MTA_METRICS_PORT"
            ) from error
        log.info("metrics: http://%s:%d/metrics", host, port)

    @contextmanager
    def training(self, job: Job) -> Iterator[None]:
        if job.tries == 1:
            self.wait.observe(max(0.0, job.started_ms - job.created_ms) / 1000)
        self._begun_s = time.monotonic()
        try:
            yield
        finally:
            self.took.observe(time.monotonic() - self._begun_s)
            self._begun_s = None


@dataclass
class JobLoop:
    """Claims a job, holds its lease during training, and writes the outcome once."""

    jobs: JobStore
    profiles: ProfileStore
    feedback: FeedbackStore
    adapters: AdapterStore
    bank: ServingBank
    trainer: AdapterTrainer
    model_lock: asyncio.Lock = field(default_factory=asyncio.Lock)  # held for each step of training, and by `signing`
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)
    tracing: Tracing = field(default_factory=Tracing)
    at_most: int = 3  # kept versions of a user's adapter
    signing: SigningLoop | None = None  # None for a bank without signatures
    releasing: set[asyncio.Task[None]] = field(default_factory=set)  # of jobs that are returned once the store answers

    async def work_once(self, wait_s: float) -> bool:
        """Wait for a job and train it if it still needs a worker; return False if no job came."""
        job_id = await self.jobs.next_job(self.bank.manifest.short, wait_s)
        if job_id is not None:
            await self._claim(job_id)
        return job_id is not None

    async def _claim(self, job_id: JobId) -> None:
        since_s = time.monotonic()
        try:
            lease = await retry_until(since_s + LEASE_S, self.jobs.claim, job_id, LEASE_S, secrets.token_hex(16))
        except StoreTimeout as error:
            log.warning("%s: not claimed: %s", job_id, error)
            return  # the queue has postponed the entry
        except TrainingError as error:
            log.error("%s: cannot be read; this counts as a try: %s", job_id, error)
            return  # the lease expires
        if lease is None:
            return
        log.info("%s: training, try %d", lease.job.id, lease.job.tries)
        outcome: str = GIVEN_UP
        try:
            with self.metrics.training(lease.job), self.tracing.span("adapt", follows=lease.job.traceparent):
                traceparent.set(self.tracing.current())
                outcome = await self._train(HeldLease(self.jobs, lease, since_s))
                self.tracing.note(outcome=outcome, tries=lease.job.tries)
        except LeaseLost:
            outcome = UNWANTED
            log.info("%s: training stopped, the lease is lost", lease.job.id)
        except StoreTimeout as error:
            log.warning("%s: training stopped, the lease expired: %s", lease.job.id, error)
            # If another worker takes the job before the store answers, this try still counts.
            release = asyncio.create_task(self._release(lease, math.inf, counts=False))
            self.releasing.add(release)
            release.add_done_callback(self.releasing.discard)
        except asyncio.CancelledError:
            await self._release(lease, counts=False)
            raise
        except Exception:
            await self._release(lease, counts=True)
            raise
        finally:
            traceparent.set("")
            self.metrics.jobs.labels(outcome).inc()

    async def _release(self, lease: Lease, until_s: float = 0.0, *, counts: bool) -> None:
        """Return the job to the queue. If the store does not answer before `until_s`, the lease expires instead."""
        try:
            if await retry_until(until_s, self.jobs.release, lease, counts=counts):
                log.info("%s: returned to the queue", lease.job.id)
        except (MtaError, StoreTimeout, RuntimeError) as error:
            log.warning("%s: not returned to the queue: %s", lease.job.id, error)

    async def _train(self, held: HeldLease) -> JobState:
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
        if self.signing is not None:  # the adapter keeps its recipe, so that is not to be by topics
            await with_lease(held, asyncio.create_task(self.signing.sign(key)), ProgressLog())
        snapshot = await held.retry(self.profiles.read, key)
        if snapshot.profile is None:
            raise TrainingError("the user no longer has a profile: create one with PUT /users/{id}/profile")
        profile = snapshot.profile.with_embedder(self.bank.manifest.embedder.id)
        if profile is None:
            raise TrainingError("the user's profile was made with another embedder: submit the job again")
        with as_training_error("the job's configuration", CONFIG_REMEDY):
            config = decode_config(lease.job.config)
            max_s = float(config.max_seconds)
        samples = []
        for position, raw in enumerate(await held.retry(self.jobs.samples, key)):
            with as_training_error(f"samples.{position}", SAMPLE_REMEDY):
                samples.append(decode_sample(raw))
        learned = [e.sample for e in (await held.retry(self.feedback.entries, key)).values() if e.sample]
        in_use = None
        if profile.adapter and bank_of(profile.adapter.recipe) == self.bank.manifest.short:
            in_use = await held.retry(self.adapters.adapter, UserAdapterId(key, profile.adapter.id))
        items = [Item(name, stored.fields) for name, stored in snapshot.items.items()]  # oldest first

        def recipe_of(signature: Signature | None, strength: float) -> FusionRecipe:
            return self.bank.personalise(profile.embedding, signature, strength).recipe

        user = JobUser(recipe_of, profile.evidence, items, in_use, shows=not lease.job.forgets)
        with self.tracing.span("train"):
            train = partial(self.trainer.train, user, samples, config, learned)
            judgement = await train_with_lease(held, max_s, train, self.model_lock)
            self.tracing.note(samples=len(samples) + len(learned), steps=judgement.steps)
        state = JobState.REJECTED if judgement.weights is None else JobState.SUCCEEDED
        trained = Trained(state, judgement.before, judgement.after, judgement.served, judgement.reason)
        if judgement.weights is None:
            await self._end(held, trained)
        else:
            recipe = recipe_of(profile.evidence, config.strength)
            samples += learned
            raw = await on_model_thread(self.trainer.encoded, recipe, judgement.weights, samples)
            created_ms = time.time_ns() // 1_000_000
            note = AdapterNote(new_adapter_id(), recipe.name, len(raw), created_ms, self.tracing.current())
            sha256 = hashlib.sha256(raw).hexdigest()
            made = AdapterVersion(note, sha256, config.rank, len(samples), trained.before, trained.after)
            await self._promote(held, trained, made, raw)
        log.info("%s: %s: held-out loss %s, without it %s", lease.job.id, state, judgement.after, judgement.before)
        return state

    async def _end(self, held: HeldLease, trained: Trained) -> None:
        if not await held.retry(self.jobs.end, held.lease, trained):
            raise LeaseLost

    async def _promote(self, held: HeldLease, trained: Trained, made: AdapterVersion, raw: bytes) -> None:
        """Write adapter and outcome atomically; retry if the user's record has changed meanwhile."""
        for _ in range(MAX_WRITE_ATTEMPTS):
            if await held.retry(self.jobs.promote, held.lease, trained, made, raw, at_most=self.at_most):
                return
            job = await held.retry(self.jobs.job, held.lease.job.id)
            if job is None or job.state.ended:
                break
        raise LeaseLost


@dataclass
class SigningLoop:
    """Makes the signatures of all users who wait, one at a time; each takes about a second."""

    queue: UserQueue
    profiles: ProfileStore
    bank: ServingBank
    signer: AdapterTrainer
    model_lock: asyncio.Lock
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)

    async def work_once(self, wait_s: float) -> bool:
        """Wait for users and sign them, for `MAX_TURN_S` if so many wait; return False if none came."""
        user_key = await self.queue.take(wait_s)
        if user_key is None:
            return False
        async with self.model_lock:
            until_s = time.monotonic() + MAX_TURN_S
            while user_key is not None:
                await self._sign_taken(user_key, until_s)
                user_key = await self.queue.take(LOOK_S) if time.monotonic() < until_s else None
        return True

    async def sign(self, user_key: str) -> None:
        """Sign a user for their job, of which a death of the worker is a try. Raises TrainingError and StoreTimeout."""
        async with self.model_lock:
            while not await self._sign(user_key, 1, time.monotonic() + LEASE_S):
                pass

    async def _sign_taken(self, user_key: str, until_s: float) -> None:
        try:
            is_settled = await self._sign(user_key, await self.queue.count_attempt(user_key), until_s)
        except StoreTimeout as error:
            log.warning("%s: not signed yet: %s", user_key, error)
            await self.queue.forget_attempts(user_key)  # tries are of workers that died
            return  # the queue has postponed the entry
        except TrainingError as error:
            log.error("%s: cannot be signed: %s", user_key, error)
            is_settled = True  # the user's next request asks again
        await self.queue.remove(user_key)
        if not is_settled:
            await self.queue.add(user_key)

    async def _sign(self, user_key: str, tries: int, until_s: float) -> bool:
        """Sign a user's items, unless signed; return False if the record changes. The caller holds the model."""
        snapshot = await retry_until(0, self.profiles.read, user_key)
        profile = snapshot.profile
        if profile is None or profile.is_signed(self.bank.manifest.short):
            return True
        items = [Item(name, stored.fields) for name, stored in snapshot.items.items()]
        if not items and profile.is_forgotten(profile.embedder, self.bank.manifest.short):
            return True  # until there are new texts
        made, phrases = await self._make(user_key, items, tries)
        if not profile.keeps_texts:
            made, phrases = profile.evidence.and_more(made) if profile.evidence else made, b""
        signed = replace(profile, signature=StoredSignature(made, profile.updated_ms), phrases=phrases)
        change = Change(signed, {}, {}, () if profile.keeps_texts else tuple(snapshot.items))
        commit = self.profiles.commit
        try:
            is_stored = await retry_until(until_s, commit, user_key, snapshot.version, change, snapshot.epoch)
        except UserErased:
            return True
        if is_stored:
            self.metrics.signatures.inc()
            log.info("%s: signed, %d items", user_key, len(items))
        return is_stored

    async def _make(self, user_key: str, items: Sequence[Item], tries: int) -> tuple[Signature, bytes]:
        """Return the items' signature and phrase table, each empty if it fails; raise Stalled if one of them hangs."""
        empty = empty_signature(self.bank.manifest.short, self.bank.manifest.personal_rows)
        if tries > MAX_SIGN_TRIES:
            log.error("%s: gets an empty signature, since signing killed %d workers", user_key, MAX_SIGN_TRIES)
            return empty, b""
        pairs = pairs_of(items, self.bank.task)
        made = await _made_or(empty, f"{user_key}: no signature", self.signer.signature, pairs)
        if pairs and made is not empty and not made.tokens:
            log.warning("%s: no signature: the gradient is not finite", user_key)
        return made, await _made_or(b"", f"{user_key}: no phrases", self.signer.phrases, items)


async def _made_or(otherwise: T, problem: str, make: Callable[[Any], T], given: object) -> T:
    """Return what a thread makes, or the other value if it fails with an error of the content."""
    try:
        return await unless_stalled(on_model_thread(make, given), problem)
    except MtaError as error:
        log.warning("%s: %s", problem, type(error.__cause__ or error).__name__)
        return otherwise
