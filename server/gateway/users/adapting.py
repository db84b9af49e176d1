"""The gateway's side of adapting: check samples, create, find and cancel training jobs, and go back to an adapter."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

from adapters.errors import excerpt
from adapters.recipe import bank_of
from adapters.training.adapt_config import AdaptConfig, default_config
from bank.items.profile import Item, parse_item
from bank.items.tasks import Task
from bank.manifest import BankManifest
from server.errors import Conflict, InvalidRequest, NotFound, Unavailable
from server.gateway.access.shares import FairQueue
from server.gateway.engines.admin import Engines
from server.gateway.users.profiles import MAX_ATTEMPTS, Profiles, check_size
from server.observability.tracing import Tracing
from server.store.adapters import AdapterStore, AdapterVersion, KeptVersions
from server.store.jobs import Job, JobId, JobStore, Submission
from server.store.profile_record import Profile
from server.store.profiles import PASSING_S
from server.store.samples import MAX_SAMPLES, JobBudget, Sample, decode_sample, encode_config, encode_sample
from server.store.tenants.holdings import Held
from server.store.tenants.user_key import User, UserKeys

MAX_CONCURRENT = 8  # engine requests in flight for one adapt request
MAX_CHECK_S = 10.0  # time after which no further batch of engine requests starts
MAX_ACCEPTED = 4096  # maximum number of remembered role sequences
T = TypeVar("T")
A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class TrainingRequest:
    """Training samples, none blank, each ending with a user turn; `options` are fields of `AdaptConfig`."""

    samples: Sequence[Sample]
    options: Mapping[str, Any]
    append: bool
    idempotency_key: str  # empty if the client sent none
    keep: bool | None = None  # what the API key says of keeping texts


@dataclass
class Adapting:
    jobs: JobStore
    adapters: AdapterStore
    profiles: Profiles
    checks: SampleChecks
    manifest: BankManifest
    budget: JobBudget
    tracing: Tracing

    async def submit(self, user: User, request: TrainingRequest, epoch: str) -> Job:
        """Store the samples and create their training job; if the user has no profile, create one from the samples.

        `epoch` is the user's epoch at the time of the request. InvalidRequest and UserErased leave the store unchanged,
        with one exception: if the first two requests for a user run at once and exceed `MAX_SAMPLES` together, the
        profile keeps the items of the refused one.
        """
        config, submission = await self._prepare(user, request, epoch)
        async with self.checks.turns.held(user.tenant):
            await self.checks.check_template(request.samples)
            await self.checks.check_lengths(submission.samples)
            stored_samples: list[bytes] = []
            if request.append:
                read = self.jobs.samples
                stored_samples = await self.profiles.rotation.at(user, lambda user: read(user.key), writes=False)
            await self.checks.check_budget(config, [*stored_samples, *submission.samples])
        job = await self.profiles.rotation.at(user, lambda user: self._submit(user, request, submission))
        if job is None:
            raise InvalidRequest(
                f"samples: more than {MAX_SAMPLES} together with the stored samples: send them without `append`",
                param="samples",
                code="too_many_samples",
            )
        return job

    async def find_duplicate(self, user: User, request: TrainingRequest, epoch: str) -> Job | None:
        """Return the job that an earlier copy of this request created, or None. Arguments and errors as in `submit`."""
        _, submission = await self._prepare(user, request, epoch)
        return await self.profiles.rotation.at(user, lambda user: self.jobs.find_duplicate(user.key, submission))

    async def _submit(self, user: User, request: TrainingRequest, submission: Submission) -> Job | None:
        _, profile, _ = await self.profiles.find(user)
        added = await self._added(user, profile, submission)
        quotas = self.profiles.quotas
        if not quotas.have_room(user, added) and (job := await self.jobs.find_duplicate(user.key, submission)):
            return job  # the client may have lost the response
        with quotas.admit(user, lambda: added):
            if profile is None or self.profiles.is_forgotten(profile):  # workers fail a job without a profile
                items = await asyncio.to_thread(_items_from_samples, request.samples, self.profiles.task)
                await self.profiles.add(user, items, submission.epoch, request.keep)
            if not self.profiles.keeps_texts(profile, request.keep):
                submission = replace(submission, forgets_s=PASSING_S)
            return await self.jobs.submit(user.key, submission, MAX_SAMPLES)

    async def _added(self, user: User, profile: Profile | None, submission: Submission) -> Held:
        """Return what a job adds to what its tenant holds; fewer than 0 bytes if its samples replace more."""
        added = Held(bytes=sum(map(len, submission.samples)), adapters=profile is None or profile.adapter is None)
        if user.tenant not in self.profiles.quotas.keys.quotas:  # of which nothing is counted
            return added
        if not submission.append:
            added["bytes"] -= sum(map(len, await self.jobs.samples(user.key)))
        if added["adapters"] and (jobs := await self.jobs.jobs(user.key)) and not jobs[-1].state.ended:
            added["adapters"] = 0  # that of the open job, which this one replaces, is counted
        return added

    async def job(self, users: UserKeys, job_id: JobId) -> Job:
        """Return a tenant's job; raise NotFound if the tenant has no such job."""
        job, owner = await asyncio.gather(self.jobs.job(job_id), self.profiles.store.load(job_id.user_key))
        if job is None and (moved_to := await self.profiles.store.moved_to(job_id.user_key)):
            return await self.job(users, JobId(moved_to, job_id.number))
        if job is None or owner is None or job_id.user_key not in users.keys(owner.user_id):
            raise _unknown_job(job_id)
        return job

    async def cancel(self, users: UserKeys, job_id: JobId) -> Job:
        """Cancel a job; a running job stops at its next training step. Raise Conflict if the job has already ended."""
        job_id = (await self.job(users, job_id)).id
        job, is_cancelled = await self.jobs.cancel(job_id)
        if job is None and (moved_to := await self.profiles.store.moved_to(job_id.user_key)):
            await self.profiles.rotation.move(job_id.user_key, moved_to, users.tenant)
            return await self.cancel(users, JobId(moved_to, job_id.number))
        if job is None:
            raise _unknown_job(job_id)
        if not is_cancelled:
            raise Conflict(f"job {job_id} has already ended: it is {job.state.value}", param="job_id", code="job_ended")
        return job

    async def versions(self, user: User) -> KeptVersions:
        return await self.profiles.rotation.at(user, lambda user: self.adapters.kept(user.key), writes=False)

    async def serve(self, user: User, number: int) -> AdapterVersion:
        """Let a kept version of a user's adapter serve; raise NotFound without it, and Conflict if of another bank."""
        return await self.profiles.rotation.at(user, lambda user: self._serve(user, number))

    async def _serve(self, user: User, number: int) -> AdapterVersion:
        for _ in range(MAX_ATTEMPTS):
            kept = await self.adapters.kept(user.key)
            chosen = next((version for version in kept.versions if version.number == number), None)
            if chosen is None:
                numbers = ", ".join(str(version.number) for version in kept.versions) or "none"
                why = f"version {number} of this user's adapter is not kept"
                raise NotFound(f"{why}: choose one that is ({numbers})", param="version", code="unknown_version")
            if (bank := bank_of(chosen.note.recipe)) != self.manifest.short:
                why = f"version {number} of this user's adapter belongs to bank {bank}, not to the one that is served"
                remedy = f"adapt the user again (POST /users/{{id}}/adapt, `mta readapt`), or serve bank {bank} again"
                raise Conflict(f"{why}: {remedy}", param="version", code="other_bank")
            if await self.adapters.serve(user.key, kept, chosen):
                return chosen
        raise Unavailable("too many other requests are changing this user: try again later", code="contention")

    async def _prepare(self, user: User, request: TrainingRequest, epoch: str) -> tuple[AdaptConfig, Submission]:
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
            tenant=user.tenant,
        )


def _items_from_samples(samples: Sequence[Sample], task: Task) -> list[Item]:
    """Return one profile item per sample: the user's last turn and the output."""
    pairs = [{"input": sample.messages[-1]["content"], "output": sample.output} for sample in samples]
    return [parse_item(pair, task, position) for position, pair in enumerate(pairs)]


def _encode_samples(samples: Sequence[Sample]) -> list[bytes]:
    encoded = list(map(encode_sample, samples))
    for position, raw in enumerate(encoded):
        check_size(f"samples.{position}", raw, samples[position].output)
    return encoded


def training_config(manifest: BankManifest, options: Mapping[str, Any]) -> AdaptConfig:
    """Fill in defaults for missing options; raise InvalidRequest if the bank does not support an option."""
    room = manifest.room
    config = default_config(room, **options)
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
    return NotFound(f"job_id {excerpt(str(job_id))} is unknown", param="job_id")


@dataclass
class SampleChecks:
    """Checks samples with an engine. If no engine answers, samples are accepted: the worker checks them again."""

    engines: Engines
    turns: FairQueue  # of tenants: what they ask of an engine here passes by its queue
    sample_tokens: int  # maximum of each
    _accepted: set[str] = field(default_factory=set)  # role sequences

    async def check_template(self, samples: Sequence[Sample]) -> None:
        """Refuse samples that the chat template refuses. Only roles matter, so each role sequence is checked once."""
        unchecked: dict[str, int] = {}  # position of the first sample, by role sequence
        for position, sample in enumerate(samples):
            if (roles := _role_sequence(sample)) not in self._accepted:
                unchecked.setdefault(roles, position)
        conversations = {position: _conversation(samples[position]) for position in unchecked.values()}
        with suppress(Unavailable):
            async for position, reason in _ask_each(self.engines.template_refusal, conversations):
                if reason is not None:
                    param = f"samples.{position}.input"
                    message = f"{param}: the model's chat template refuses these messages: {excerpt(reason, 300)}"
                    raise InvalidRequest(message, param=param, code="refused_by_template")
                if len(self._accepted) >= MAX_ACCEPTED:
                    self._accepted.clear()
                self._accepted.add(_role_sequence(samples[position]))

    async def check_lengths(self, raw_samples: Sequence[bytes]) -> None:
        """Refuse samples that are too long. A token has at least one byte, so few samples need counting."""
        longest = min(self.engines.context or self.sample_tokens, self.sample_tokens)
        to_count = {position: raw for position, raw in enumerate(raw_samples) if len(raw) > longest}
        async for position, tokens in _ask_each(self._count_tokens, to_count):
            if tokens is not None and tokens > longest:
                raise InvalidRequest(
                    f"samples.{position} has {tokens} tokens, but a sample may have at most {longest}: shorten it",
                    param=f"samples.{position}",
                    code="context_length_exceeded",
                )

    async def check_budget(self, config: AdaptConfig, raw_samples: Sequence[bytes]) -> None:
        """Refuse a job that reads more tokens than its configuration allows; `Unavailable` if that is not known now."""
        token_counts = [min(len(raw), self.sample_tokens) for raw in raw_samples]  # upper bounds
        if _fits(config, token_counts):
            return
        uncounted = len(raw_samples)
        async for position, tokens in _ask_each(self._count_tokens, dict(enumerate(raw_samples))):
            if tokens is not None:
                token_counts[position] = min(token_counts[position], tokens)
                uncounted -= 1
        if _fits(config, token_counts):
            return
        if uncounted:
            raise Unavailable(
                f"samples: the tokens of {uncounted} of {len(raw_samples)} samples could not be counted now, and "
                "by their bytes the job may be too large: try again in a moment, or send fewer",
                code="engine_unavailable",
            )
        one_step = replace(config, steps=1)
        if not _fits(one_step, token_counts):
            raise InvalidRequest(
                f"samples: {len(token_counts)} samples with {sum(token_counts)} tokens make a job that reads about "
                f"{one_step.tokens_read(token_counts)} tokens even in one step, but at most {config.max_tokens} are "
                "allowed: send fewer",
                param="samples",
                code="job_too_large",
            )
        max_steps = next(n for n in range(config.steps - 1, 0, -1) if _fits(replace(config, steps=n), token_counts))
        raise InvalidRequest(
            f"config.steps {config.steps} makes a job that reads about {config.tokens_read(token_counts)} tokens over "
            f"its {len(token_counts)} samples, but at most {config.max_tokens} are allowed: with {max_steps} steps it "
            "would fit",
            param="config.steps",
            code="job_too_large",
        )

    async def _count_tokens(self, raw_sample: bytes) -> int | None:
        return await self.engines.count_tokens(_conversation(decode_sample(raw_sample)))


def _fits(config: AdaptConfig, token_counts: Sequence[int]) -> bool:
    return config.tokens_read(token_counts) <= config.max_tokens


async def _ask_each(ask: Callable[[T], Awaitable[A]], values: Mapping[int, T]) -> AsyncIterator[tuple[int, A]]:
    """Yield each value's position and answer, in order, with bounded concurrency; stop early after `MAX_CHECK_S`."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + MAX_CHECK_S
    positions = list(values)
    for start in range(0, len(positions), MAX_CONCURRENT):
        if loop.time() > deadline_s:
            return
        batch = positions[start : start + MAX_CONCURRENT]
        answers = await asyncio.gather(*(ask(values[position]) for position in batch))
        for position, answer in zip(batch, answers, strict=True):
            yield position, answer


def _conversation(sample: Sample) -> list[dict[str, str]]:
    """Return the messages and the output as one conversation, as training renders it."""
    return [*sample.messages, {"role": "assistant", "content": sample.output}]


def _role_sequence(sample: Sample) -> str:
    return "".join(message["role"][0] for message in sample.messages)
