"""The gateway's side of adapting: check samples, and create, find and cancel training jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from adapters.errors import excerpt
from adapters.training.adapt_config import AdaptConfig, default_config
from bank.items.profile import parse_item
from bank.items.tasks import Task
from bank.manifest import BankManifest
from server.errors import Conflict, InvalidRequest, NotFound, Unavailable
from server.gateway.engines.admin import Engines
from server.gateway.users.profiles import Profiles
from server.settings import MAX_ITEM_BYTES
from server.store.jobs import Job, JobId, JobStore, Submission
from server.store.samples import MAX_SAMPLES, JobBudget, Sample, decode_sample, encode_config, encode_sample
from server.store.tenants.user_key import User, UserKeys
from server.watching.tracing import Tracing

MAX_CONCURRENT = 8  # engine requests in flight for one adapt request
MAX_CHECK_S = 10.0  # time after which no further batch of engine requests starts
MAX_ACCEPTED = 4096  # maximum number of remembered role sequences
A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """Training samples, none blank, each ending with a user turn; `options` are fields of `AdaptConfig`."""

    samples: Sequence[Sample]
    options: Mapping[str, Any]
    append: bool
    idempotency_key: str  # empty if the client sent none


@dataclass
class Adapting:
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


@dataclass
class SampleChecks:
    """Checks samples with an engine. If no engine answers, samples are accepted: the worker checks them again."""

    engines: Engines
    _accepted: set[str] = field(default_factory=set)  # role sequences

    async def check_template(self, samples: Sequence[Sample]) -> None:
        """Refuse samples that the chat template refuses. Only roles matter, so each role sequence is checked once."""
        first: dict[str, int] = {}
        for place, sample in enumerate(samples):
            first.setdefault(_role_sequence(sample), place)
        places = [place for roles, place in first.items() if roles not in self._accepted]
        with suppress(Unavailable):
            async for place, reason in _ask_each(
                lambda place: self.engines.template_refusal(_conversation(samples[place])), places
            ):
                if reason is not None:
                    param = f"samples.{place}.input"
                    message = f"{param}: the model's chat template refuses these messages: {excerpt(reason, 300)}"
                    raise InvalidRequest(message, param=param, code="refused_by_template")
                if len(self._accepted) >= MAX_ACCEPTED:
                    self._accepted.clear()
                self._accepted.add(_role_sequence(samples[place]))

    async def check_lengths(self, raw_samples: Sequence[bytes]) -> None:
        """Refuse samples longer than the context. A token has at least one byte, so few samples need counting."""
        context = self.engines.context
        if context is None:
            return
        to_count = [place for place, raw in enumerate(raw_samples) if len(raw) > context]
        async for place, tokens in _ask_each(lambda place: self._count(raw_samples[place]), to_count):
            if tokens is not None and tokens > context:
                raise InvalidRequest(
                    f"samples.{place} has {tokens} tokens, the model's context is {context}: shorten it",
                    param=f"samples.{place}",
                    code="context_length_exceeded",
                )

    async def check_budget(self, config: AdaptConfig, raw_samples: Sequence[bytes]) -> None:
        """Refuse a job that would read more tokens than its configuration allows, which bounds the job's time."""

        def fits(steps: int) -> bool:
            return replace(config, steps=steps).tokens_read(lengths) <= config.max_tokens

        context = self.engines.context
        lengths = [min(len(raw), context or len(raw)) for raw in raw_samples]  # bytes, an upper bound on tokens
        if fits(config.steps):
            return
        async for place, tokens in _ask_each(lambda place: self._count(raw_samples[place]), range(len(raw_samples))):
            lengths[place] = lengths[place] if tokens is None else min(tokens, lengths[place])
        if fits(config.steps):
            return
        steps = next(filter(fits, range(config.steps - 1, 0, -1)), None)
        if steps is None:
            least = replace(config, steps=1).tokens_read(lengths)
            raise InvalidRequest(
                f"samples: {len(lengths)} samples with {sum(lengths)} tokens in all make a job that reads about "
                f"{least} tokens even in a single step, but at most {config.max_tokens} are allowed: send fewer",
                param="samples",
                code="job_too_large",
            )
        raise InvalidRequest(
            f"config.steps {config.steps} makes a job that reads about {config.tokens_read(lengths)} tokens over its "
            f"{len(lengths)} samples, but at most {config.max_tokens} are allowed: with {steps} steps it would fit",
            param="config.steps",
            code="job_too_large",
        )

    async def _count(self, raw: bytes) -> int | None:
        return await self.engines.count_tokens(_conversation(decode_sample(raw)))


async def _ask_each(ask: Callable[[int], Awaitable[A]], places: Sequence[int]) -> AsyncIterator[tuple[int, A]]:
    """Yield each place and its answer, in order, with bounded concurrency; stop early after `MAX_CHECK_S`."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + MAX_CHECK_S
    for start in range(0, len(places), MAX_CONCURRENT):
        if loop.time() > deadline_s:
            return
        batch = places[start : start + MAX_CONCURRENT]
        for place, answer in zip(batch, await asyncio.gather(*map(ask, batch)), strict=True):
            yield place, answer


def _conversation(sample: Sample) -> list[dict[str, str]]:
    """Return the messages and the output as one conversation, as training renders it."""
    return [*sample.messages, {"role": "assistant", "content": sample.output}]


def _role_sequence(sample: Sample) -> str:
    """Return the first letter of each message's role."""
    return "".join(message["role"][0] for message in sample.messages)
