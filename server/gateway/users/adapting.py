"""The gateway's side of adapting: from a request to a job, and from a job to its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from adapters.errors import excerpt
from adapters.training.adapt_config import AdaptConfig, default_config
from bank.items.profile import Item, parse_item
from bank.items.tasks import Task
from bank.manifest import BankManifest
from server.errors import Conflict, InvalidRequest, NotFound
from server.gateway.users.profiles import Profiles
from server.gateway.users.sample_checks import SampleChecks
from server.store.jobs import Job, JobId, JobStore, Submission
from server.store.samples import MAX_SAMPLES, JobBudget, Sample, encode_config, encode_sample
from server.store.tenants.user_key import User, UserKeys
from server.watching.tracing import Tracing


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """Samples to adapt to, none blank, each ending with the user's turn, and how: `options` are of `AdaptConfig`.

    An empty `idempotency_key` is none.
    """

    samples: Sequence[Sample]
    options: Mapping[str, Any]
    append: bool
    idempotency_key: str


class Adapting:
    """Accepts samples, creates jobs, and looks them up."""

    def __init__(
        self,
        jobs: JobStore,
        profiles: Profiles,
        *,
        checks: SampleChecks,
        manifest: BankManifest,
        task: Task,
        max_sample_bytes: int,
        budget: JobBudget,
        tracing: Tracing,
    ) -> None:
        self._jobs = jobs
        self._checks = checks
        self._profiles = profiles
        self._manifest = manifest
        self._task = task
        self._max_sample_bytes = max_sample_bytes
        self._budget = budget
        self._tracing = tracing

    async def submit(self, user: User, request: TrainingRequest, epoch: str) -> Job:
        """Store the samples and create the job that trains on them; a user without a profile gets one made of them.

        `epoch` is the user's when the request was accepted.

        Raises:
            InvalidRequest: naming the sample or the option that is wrong; nothing is changed.
            UserErased: when the user is erased meanwhile; nothing of them is stored.
        """
        config, samples = self._config(request), await self._encoded(request)
        await self._checks.check_template(request.samples)
        await self._checks.check_lengths(samples)
        kept = await self._jobs.samples(user.key) if request.append else []
        await self._checks.check_budget(config, [*kept, *samples])
        if await self._profiles.current(user) is None:
            items = await asyncio.to_thread(self._items, request.samples)
            await self._profiles.add(user, items, epoch)
        job = await self._jobs.submit(user.key, self._submission(request, samples, config, epoch), MAX_SAMPLES)
        if job is None:
            raise InvalidRequest(
                f"samples: with those already kept there would be more than {MAX_SAMPLES}: send them without `append`",
                param="samples",
                code="too_many_samples",
            )
        return job

    async def repeated(self, user: User, request: TrainingRequest, epoch: str) -> Job | None:
        """The job that the same request has made before, if it has; nothing is changed. Otherwise as `submit`."""
        config, samples = self._config(request), await self._encoded(request)
        # Without room for any sample there is no new job.
        return await self._jobs.submit(user.key, self._submission(request, samples, config, epoch), 0)

    async def job_ids(self, user: User) -> list[JobId]:
        """The user's jobs that are remembered."""
        return [job.id for job in await self._jobs.jobs(user.key)]

    async def job(self, users: UserKeys, job_id: JobId) -> Job:
        """A job of a tenant's.

        Raises:
            NotFound: when the tenant has no such job, or no longer.
        """
        job, owner = await asyncio.gather(self._jobs.job(job_id), self._profiles.owner(job_id.user_key))
        if job is None or owner is None or users.key(owner) != job_id.user_key:
            raise _unknown(job_id)
        return job

    async def cancel(self, users: UserKeys, job_id: JobId) -> Job:
        """Cancel a job; a worker that is training it stops at its next step.

        Raises:
            NotFound: as `job`.
            Conflict: when it has already ended.
        """
        await self.job(users, job_id)
        job, ended = await self._jobs.cancel(job_id)
        if job is None:
            raise _unknown(job_id)
        if not ended:
            raise Conflict(f"job {job_id} has already ended: it is {job.state.value}", param="job_id", code="job_ended")
        return job

    async def _encoded(self, request: TrainingRequest) -> list[bytes]:
        """Each sample as it is stored. Megabytes take a large part of a second: not on the event loop."""

        def encoded() -> list[bytes]:
            samples = list(map(encode_sample, request.samples))
            for place, raw in enumerate(samples):
                if len(raw) > self._max_sample_bytes:
                    raise InvalidRequest(
                        f"samples.{place} has {len(raw)} bytes as JSON, at most {self._max_sample_bytes} are allowed: "
                        f"{excerpt(request.samples[place].output)}",
                        param=f"samples.{place}",
                        code="sample_too_large",
                    )
            return samples

        return await asyncio.to_thread(encoded)

    def _config(self, request: TrainingRequest) -> AdaptConfig:
        return replace(training_config(self._manifest, request.options), **asdict(self._budget))

    def _submission(
        self, request: TrainingRequest, samples: Sequence[bytes], config: AdaptConfig, epoch: str
    ) -> Submission:
        return Submission(
            samples,
            request.append,
            encode_config(config),
            bank=self._manifest.short,
            epoch=epoch,
            idempotency_key=request.idempotency_key,
            traceparent=self._tracing.current(),
        )

    def _items(self, samples: Sequence[Sample]) -> list[Item]:
        """The samples as items of a profile: as pairs of texts that are not blank, they are of any task."""
        return [
            parse_item({"input": sample.messages[-1]["content"], "output": sample.output}, self._task, place)
            for place, sample in enumerate(samples)
        ]


def training_config(manifest: BankManifest, options: Mapping[str, Any]) -> AdaptConfig:
    """How a job trains: as requested, with the server's defaults for the rest.

    Raises:
        InvalidRequest: when the bank cannot serve the result.
    """
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


def _unknown(job_id: JobId) -> NotFound:
    return NotFound(f"job_id {excerpt(str(job_id))} is unknown: ended jobs are kept for 7 days", param="job_id")
