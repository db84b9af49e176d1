"""The worker's loop: take a job, hold its lease while it trains, and write what came of it, once.

Whatever is lost on the way, the lease decides: a worker that cannot renew it writes nothing any more, and another takes
the job up once it has run out.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from adapters.errors import TrainingError
from adapters.recipe import FusionRecipe
from adapters.user_run import Progress
from adapters.user_trainer import Judgement
from bank.serving import ServingBank
from server.errors import ApiError
from server.store.adapters import StoredAdapter
from server.store.jobs import JobId, JobState, JobStore, Lease, Trained
from server.store.profiles import AdapterNote, ProfileStore
from server.store.samples import AdaptConfig, Sample, decode_config, decode_sample, new_adapter_id

log = logging.getLogger("mta.worker")

LEASE_S = 15.0
RENEW_S = 1.0
SWEEP_S = 5.0
PROMOTE_ATTEMPTS = 20


class Trains(Protocol):
    """What is needed of `server.adapt_worker.training.AdapterTrainer`."""

    def train(
        self,
        recipe: FusionRecipe,
        samples: Sequence[Sample],
        config: AdaptConfig,
        on_step: Callable[[Progress], None],
    ) -> Judgement: ...

    def encoded(self, recipe: FusionRecipe, judgement: Judgement) -> bytes: ...


class _Stopped(Exception):
    """The lease is lost, or the worker shall end: training has no purpose any more."""


class Worker:
    """Trains one job at a time.

    Args:
        name: tells it from others in the queue.
        jobs: where jobs are.
        profiles: where users are.
        bank: finds the recipe that a user's adapter is trained on.
        trainer: trains.
        model: held while the base model is in use, where others use it too.
    """

    def __init__(
        self,
        name: str,
        jobs: JobStore,
        profiles: ProfileStore,
        bank: ServingBank,
        trainer: Trains,
        *,
        model: asyncio.Lock | None = None,
    ) -> None:
        self._name = name
        self._jobs = jobs
        self._profiles = profiles
        self._bank = bank
        self._trainer = trainer
        self._model = model or asyncio.Lock()

    async def run(self) -> None:
        """Work until cancelled; an unreachable store is waited for.

        What nobody foresaw, a want of memory in its many disguises above all, is raised: the process had better begin
        anew, and the job is given to another until its tries are used up.
        """
        sweeping = asyncio.create_task(self._sweep())
        try:
            while True:
                try:
                    await self.work_once(SWEEP_S)
                except ApiError as error:
                    log.warning("%s", error.explained)
                    await asyncio.sleep(RENEW_S)
        finally:
            sweeping.cancel()

    async def work_once(self, wait_s: float) -> bool:
        """Wait for word of a job and train it, if it still wants a worker; whether there was word of one."""
        job_id = await self._jobs.next_job(self._bank.manifest.short, self._name, wait_s)
        if job_id is None:
            return False
        async with self._model:
            await self._take(job_id)
        return True

    async def _take(self, job_id: JobId) -> None:
        """Train a job, if it still wants a worker."""
        lease = await self._jobs.claim(job_id, LEASE_S)
        if lease is None:
            return
        log.info("%s: training, try %d", lease.job.id, lease.job.tries)
        try:
            await self._work(lease)
        except _Stopped:
            log.info("%s: given up, the lease is lost", lease.job.id)
        except TrainingError as error:
            await self._jobs.end(lease, Trained(JobState.FAILED, error=str(error)))
        except ApiError:
            raise  # the lease runs out, and the job is taken up again
        except asyncio.CancelledError:
            await self._give_back(lease, counts=False)
            raise
        except Exception:
            await self._give_back(lease, counts=True)
            raise

    async def _give_back(self, lease: Lease, *, counts: bool) -> None:
        """The worker ends: have another take the job up at once. Without a store, its lease runs out."""
        try:
            if await self._jobs.release(lease, counts=counts):
                log.info("%s: given back", lease.job.id)
        except ApiError as error:
            log.warning("%s: not given back: %s", lease.job.id, error.explained)

    async def _work(self, lease: Lease) -> None:
        key = lease.job.id.user_key
        profile = await self._profiles.load(key)
        if profile is None:
            raise TrainingError("the user has no profile any more: PUT /users/{id}/profile makes one")
        profile = profile.seen_by(self._bank.manifest.embedder.id)
        if profile is None:
            raise TrainingError("the user's profile was made with another embedder: ask for the job again")
        config = decode_config(lease.job.config)
        recipe = self._bank.personalise(profile.embedding, profile.evidence, config.strength).recipe
        samples = [decode_sample(raw) for raw in await self._jobs.samples(key)]
        judgement = await self._trained(lease, recipe, samples, config)
        if judgement.weights is None:
            done = await self._jobs.end(lease, Trained(JobState.REJECTED, judgement.before, judgement.after))
        else:
            raw = await asyncio.to_thread(self._trainer.encoded, recipe, judgement)
            done = await self._promote(lease, recipe, judgement, raw)
        if not done:
            raise _Stopped
        log.info("%s: held-out loss %.4f, before %.4f", lease.job.id, judgement.after, judgement.before)

    async def _trained(
        self, lease: Lease, recipe: FusionRecipe, samples: Sequence[Sample], config: AdaptConfig
    ) -> Judgement:
        """Train on a thread, renewing the lease; when it is lost, training ends at its next step."""
        lost, latest = threading.Event(), Progress(0, 0, 0.0)

        def on_step(progress: Progress) -> None:
            nonlocal latest
            latest = progress
            if lost.is_set():
                raise _Stopped

        training = asyncio.create_task(asyncio.to_thread(self._trainer.train, recipe, samples, config, on_step))
        try:
            while not training.done():
                await asyncio.wait({training}, timeout=RENEW_S)
                loss = latest.loss if latest.step else None
                if not await self._jobs.renew(lease, LEASE_S, step=latest.step, of=latest.of, loss=loss):
                    raise _Stopped
            return training.result()
        finally:
            lost.set()
            await asyncio.gather(training, return_exceptions=True)

    async def _promote(self, lease: Lease, recipe: FusionRecipe, judgement: Judgement, raw: bytes) -> bool:
        """Write adapter and outcome in one step; again when the user's record changed meanwhile."""
        stored = StoredAdapter(new_adapter_id(), recipe.name, hashlib.sha256(raw).hexdigest(), raw)
        trained = Trained(JobState.SUCCEEDED, judgement.before, judgement.after)
        for _ in range(PROMOTE_ATTEMPTS):
            snapshot = await self._profiles.read(lease.job.id.user_key)
            if snapshot.profile is None:
                return False
            note = AdapterNote(stored.id, recipe.name, len(raw), time.time_ns() // 1_000_000)
            noted = replace(snapshot.profile, adapter=note)
            if await self._jobs.promote(lease, trained, noted, snapshot.version, stored):
                return True
            job = await self._jobs.job(lease.job.id)
            if job is None or job.state.ended:
                return job is not None and job.adapter == stored.id  # done, and only the answer was lost
        return False

    async def _sweep(self) -> None:
        """Have lost jobs announced again, for as long as the worker runs."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                for job_id in await self._jobs.overdue(self._bank.manifest.short):
                    log.info("%s: announced again", job_id)
            except ApiError as error:
                log.warning("%s", error.explained)
