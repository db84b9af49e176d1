"""The gateway's side of adapting: create, find and cancel training jobs."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from adapters.errors import excerpt
from adapters.training.adapt_config import AdaptConfig, default_config
from bank.items.profile import parse_item
from bank.items.tasks import Task
from bank.manifest import BankManifest
from server.errors import Conflict, InvalidRequest, NotFound
from server.gateway.users.profiles import Profiles
from server.gateway.users.sample_checks import SampleChecks
from server.settings import MAX_ITEM_BYTES
from server.store.jobs import Job, JobId, JobStore, Submission
from server.store.samples import MAX_SAMPLES, JobBudget, Sample, encode_config, encode_sample
from server.store.tenants.user_key import User, UserKeys
from server.watching.tracing import Tracing


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """Training samples, none blank, each ending with a user turn; `options` are fields of `AdaptConfig`."""

    samples: Sequence[Sample]
    options: Mapping[str, Any]
    append: bool
    idempotency_key: str  # empty if the client sent none


@dataclass
class Adapting:
    """Creates, finds and cancels jobs."""

    jobs: JobStore
    profiles: Profiles
    checks: SampleChecks
    manifest: BankManifest
    task: Task
    budget: JobBudget
    tracing: Tracing

    async def submit(self, user: User, request: TrainingRequest, epoch: str) -> Job:
        """Store the samples and create their training job; if the user has no profile, create one from the samples.

        `epoch` is the user's epoch at the time of the request. InvalidRequest and UserErased leave the store unchanged.
        """
        config, submission = await self._prepare(request, epoch)
        await self.checks.check_template(request.samples)
        await self.checks.check_lengths(submission.samples)
        kept = await self.jobs.samples(user.key) if request.append else []
        await self.checks.check_budget(config, [*kept, *submission.samples])
        if await self.profiles.current(user) is None:
            pairs = [{"input": each.messages[-1]["content"], "output": each.output} for each in request.samples]
            items = await asyncio.to_thread(lambda: [parse_item(pair, self.task, at) for at, pair in enumerate(pairs)])
            await self.profiles.add(user, items, epoch)
        job = await self.jobs.submit(user.key, submission, MAX_SAMPLES)
        if job is None:
            raise InvalidRequest(
                f"samples: more than {MAX_SAMPLES} together with the stored samples: send them without `append`",
                param="samples",
                code="too_many_samples",
            )
        return job

    async def find_duplicate(self, user: User, request: TrainingRequest, epoch: str) -> Job | None:
        """Return the job that an earlier copy of this request created, or None. Arguments and errors as in `submit`."""
        _, submission = await self._prepare(request, epoch)
        return await self.jobs.submit(user.key, submission, 0)  # a limit of 0 samples prevents a new job

    async def job_ids(self, user: User) -> list[JobId]:
        return [job.id for job in await self.jobs.jobs(user.key)]

    async def job(self, users: UserKeys, job_id: JobId) -> Job:
        """Return a tenant's job; raise NotFound if the tenant has no such job."""
        job, owner = await asyncio.gather(self.jobs.job(job_id), self.profiles.store.load(job_id.user_key))
        if job is None or owner is None or users.key(owner.user_id) != job_id.user_key:
            raise _unknown_job(job_id)
        return job

    async def cancel(self, users: UserKeys, job_id: JobId) -> Job:
        """Cancel a job; a running job stops at its next training step. Raise Conflict if the job has already ended."""
        await self.job(users, job_id)
        job, ended = await self.jobs.cancel(job_id)
        if job is None:
            raise _unknown_job(job_id)
        if not ended:
            raise Conflict(f"job {job_id} has already ended: it is {job.state.value}", param="job_id", code="job_ended")
        return job

    async def _prepare(self, request: TrainingRequest, epoch: str) -> tuple[AdaptConfig, Submission]:
        config = replace(training_config(self.manifest, request.options), **asdict(self.budget))
        # Encoding megabytes of samples would block the event loop for a large part of a second.
        samples = await asyncio.to_thread(_encode_samples, request.samples)
        return config, Submission(
            samples,
            request.append,
            encode_config(config),
            bank=self.manifest.short,
            epoch=epoch,
            idempotency_key=request.idempotency_key,
            traceparent=self.tracing.current(),
        )


def _encode_samples(samples: Sequence[Sample]) -> list[bytes]:
    """Encode the samples as the store keeps them."""
    encoded = list(map(encode_sample, samples))
    for place, raw in enumerate(encoded):
        if len(raw) > MAX_ITEM_BYTES:
            raise InvalidRequest(
                f"samples.{place} has {len(raw)} bytes as JSON, at most {MAX_ITEM_BYTES} are allowed: "
                f"{excerpt(samples[place].output)}",
                param=f"samples.{place}",
                code="sample_too_large",
            )
    return encoded


def training_config(manifest: BankManifest, options: Mapping[str, Any]) -> AdaptConfig:
    """Fill in defaults for missing options; raise InvalidRequest if the bank does not support an option."""
    room = manifest.room
    config = replace(default_config(room, manifest.common), **options)
    if config.rank > room:
        raise InvalidRequest(
            f"config.rank {config.rank} does not fit: this bank leaves a rank of {room} for users", param="config.rank"
        )
    if config.strength < 1 and not manifest.common:
        raise InvalidRequest(
            f"config.strength {config.strength:g} needs a common row for the rest, which this bank lacks: leave it out",
            param="config.strength",
        )
    return config


def _unknown_job(job_id: JobId) -> NotFound:
    return NotFound(f"job_id {excerpt(str(job_id))} is unknown: ended jobs are kept for 7 days", param="job_id")
