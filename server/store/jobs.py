"""Adapt jobs: their records, and the samples they train on (keys: `server/store/redis/keys.py`).

The record is authoritative; the bank's queue (`queue.py`) only says when to check it. Its hash also holds `token` of
the submission; `epoch`, for workers of an earlier version; `lease`, `lease_until` and `lease_ms` while a worker has it;
`made_by` and `ended_by`, tokens of the calls. Only a user's newest job can be open. Each change is atomic and safe
to repeat. An erasure removes the records, so whoever trains meanwhile has no lease.
"""

from __future__ import annotations

import hashlib
import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple

import orjson

from adapters.recipe import bank_of
from server.errors import Unavailable, UserErased
from server.store.adapters import AdapterStore, AdapterVersion
from server.store.append_only_file import AppendOnlyFile
from server.store.base import Store, corrupt_if_undecodable
from server.store.profile_record import encode_profile
from server.store.queue import Backlog, UserQueue
from server.store.redis import keys
from server.store.redis.scripts import script
from server.store.redis.servers.base import WRITE_TIMEOUT_S
from server.store.redis.servers.connection import RedisConnection
from server.store.samples import NO_CURVE, Curve, decode_curve

log = logging.getLogger("mta.store")

KEPT_JOBS = 20  # number of newest jobs kept per user, until an erasure
MAX_TRIES = 3
_JOB_ID = re.compile(r"([a-z2-7]{26})\.([1-9][0-9]{0,9})")
_REFUSED, _ERASED, _LATE = 0, -1, -2
_FIRST_NUMBER_RANGE = 1 << 32  # a user's first number is random: an erasure forgets those used, but ids are not reused
_TRIES_EXHAUSTED = (
    f"this job was started {MAX_TRIES} times and never finished. Most likely its workers ran out of memory: send fewer "
    "or shorter samples, or give workers more memory. If its record is damaged, send the samples again. The workers' "
    "logs show the cause"
)
_SUBMIT = script("jobs/submit")
_FIND = script("jobs/find")
_LIST = script("jobs/list")
_OPEN = script("jobs/open")
_CANCEL = script("jobs/cancel")
_CLAIM = script("jobs/claim")
_RENEW = script("jobs/renew")
_RELEASE = script("jobs/release")
_END = script("jobs/end")
_STRINGS = ("config", "bank", "adapter", "error", "traceparent")
_INTEGERS = ("created_ms", "started_ms", "ended_ms", "tries", "step", "of", "forgets")
_LOSSES = ("before", "after", "served")
_FIELDS = ("state", "curve", "key", *_STRINGS, *_INTEGERS, *_LOSSES)


class JobState(StrEnum):
    """State of a job; all but the first two are final."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    REJECTED = "rejected"
    FAILED = "failed"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"

    @property
    def ended(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)


class JobId(NamedTuple):
    """`<user key>.<number>`: locates the job's keys without revealing the user's id."""

    user_key: str
    number: int

    def __str__(self) -> str:
        return f"{self.user_key}.{self.number}"


def parse_job_id(text: str) -> JobId | None:
    match = _JOB_ID.fullmatch(text)
    return JobId(match[1], int(match[2])) if match else None


@dataclass(frozen=True, slots=True)
class Job:
    """A job's record. Times are Unix time, 0 if not reached; strings are empty if not set."""

    id: JobId
    state: JobState
    config: str  # as JSON
    created_ms: int
    bank: str  # 8 hex digits
    started_ms: int = 0
    ended_ms: int = 0
    tries: int = 0  # number of times a worker has claimed the job
    step: int = 0  # steps done, over all runs
    of: int = 0  # steps in total
    curve: Curve = NO_CURVE
    before: float | None = None  # held-out loss with the fused adapter only
    after: float | None = None  # held-out loss with the trained adapter too
    served: float | None = None  # held-out loss with the adapter that was served meanwhile
    adapter: str = ""  # id of the promoted user adapter
    error: str = ""  # why the job failed, in words
    traceparent: str = ""  # trace context of the request
    idempotency_key: str = ""
    forgets: int = 0  # 1 if its samples go when it ends
    is_new: bool = field(default=False, compare=False)  # the call that returned it has created it


@dataclass(frozen=True, slots=True)
class Submission:
    """A request for a job."""

    samples: Sequence[bytes]  # encoded separately; duplicates are stored once
    append: bool  # add to the stored samples instead of replacing them
    config: str
    bank: str
    epoch: str = ""  # the user's when the request began (`ProfileStore.begin`)
    idempotency_key: str = ""  # the same key returns the same job while that is kept
    traceparent: str = ""
    tenant: str = ""  # whose turn it takes in the queue
    background: bool = False  # not requested by a user: trained when nothing else is due
    forgets_s: int = 0  # samples go when the job ends, at the latest after this time; 0: they stay

    @property
    def token(self) -> str:
        """Hash by which a repeated submission is recognised."""
        digests = [hashlib.sha256(sample).hexdigest() for sample in self.samples]
        return hashlib.sha256(orjson.dumps([self.bank, self.append, self.config, *digests])).hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's claim on a job, valid while the job's record holds the same token."""

    job: Job
    token: str


@dataclass(frozen=True, slots=True)
class Trained:
    """Result of training; fields as in `Job`. It is stored only if the lease is still valid."""

    state: JobState
    before: float | None = None
    after: float | None = None
    served: float | None = None
    error: str = ""


class JobStore(Store):
    """Stores jobs and samples."""

    def __init__(self, connection: RedisConnection) -> None:
        super().__init__(connection)
        self._adapters = AdapterStore(connection)
        self._queue = cache(lambda bank: UserQueue(connection, "jobs", bank))  # cached because a queue remembers scores

    async def submit(self, user_key: str, submission: Submission, max_samples: int) -> Job | None:
        """Store samples and create a job that trains on them; older open jobs of the user become superseded.

        Returns the existing job for a repeated submission; None if the user would have more than `max_samples`, and for
        a background job beside an open one of its bank. Raises `UserErased` if the user was erased since the request.
        """
        queue = self._queue(submission.bank)
        if submission.forgets_s:
            await AppendOnlyFile(self._connection).announce(user_key, submission.forgets_s * 1000)
        # Reserve first: an entry without a job is harmless, but a job without an entry would never be trained.
        reservation = await queue.reserve(user_key, background=submission.background)
        given = _as_given(user_key, submission) | {
            "number_before": secrets.randbelow(_FIRST_NUMBER_RANGE),
            "until_ms": reservation.until_ms,
            "call": secrets.token_hex(8),
            "max_samples": max_samples,
        }
        names = (keys.jobs(user_key), keys.samples(user_key), keys.epoch(user_key), keys.adapter(user_key))
        done = await self._connection.write(_SUBMIT, names, orjson.dumps(given), *submission.samples)
        number, is_new = map(int, done)
        job = await self.job(JobId(user_key, number)) if number > 0 else None
        if job is not None and job.state is JobState.QUEUED:
            await queue.add(user_key, reservation, tenant=submission.tenant, background=submission.background)
        else:
            await queue.cancel_reservation(reservation)
        if number == _LATE:
            raise Unavailable("the store took too long to accept the samples: send the request again")
        if job is None and number != _REFUSED:
            raise UserErased
        return job and replace(job, is_new=bool(is_new))

    async def find_duplicate(self, user_key: str, submission: Submission) -> Job | None:
        """Return the job that an earlier copy of a submission created, or None. Raises UserErased as `submit` does."""
        names = (keys.jobs(user_key), keys.epoch(user_key), keys.adapter(user_key))
        number = int(await self._connection.write(_FIND, names, orjson.dumps(_as_given(user_key, submission))))
        job = await self.job(JobId(user_key, number)) if number > 0 else None
        if job is None and number == _ERASED:
            raise UserErased
        return job

    async def job(self, job_id: JobId) -> Job | None:
        values = await self._connection.run(lambda redis: redis.hmget(keys.job(*job_id), _FIELDS))
        with corrupt_if_undecodable():
            return _decoded(job_id, values)

    async def jobs(self, user_key: str) -> list[Job]:  # oldest first
        arguments = (keys.job_prefix(user_key), KEPT_JOBS, *_FIELDS)
        listed = await self._connection.evaluate(_LIST, (keys.jobs(user_key),), *arguments)
        with corrupt_if_undecodable():
            jobs = [_decoded(JobId(user_key, number), values) for number, values in listed]
        return [job for job in jobs if job is not None]

    async def cancel(self, job_id: JobId) -> tuple[Job | None, bool]:
        """Cancel a job; return its current record and whether this call ended it.

        Returns no record for a user who has moved to another key.
        """
        names = (keys.job(*job_id), keys.epoch(job_id.user_key))
        ended = await self._connection.write(_CANCEL, names, secrets.token_hex(16))
        if ended < 0:
            return None, False
        return await self.job(job_id), bool(ended)

    async def samples(self, user_key: str) -> list[bytes]:  # oldest first
        name = keys.samples(user_key)
        return list(await self._connection.run(lambda redis: redis.lrange(name, 0, -1), WRITE_TIMEOUT_S))

    async def has_samples(self, user_key: str) -> bool:  # given, or learned from feedback
        names = keys.samples(user_key), keys.learned(user_key)
        return bool(await self._connection.run(lambda redis: redis.exists(*names)))

    async def next_job(self, bank: str, wait_s: float) -> JobId | None:
        """Wait for a job that needs a worker. If it is not claimed, other workers get it a few seconds later."""
        queue, until_s = self._queue(bank), time.monotonic() + wait_s
        while (user_key := await queue.take(until_s - time.monotonic())) is not None:
            try:
                job_id, held_ms = await self.open_job(user_key, bank)
            except Unavailable as error:
                if error.code != "store_corrupt":
                    raise
                log.error("%s: %s", user_key, error.explained)
                continue  # `take` has postponed the entry, so it does not block the others
            if job_id is None:
                await queue.remove(user_key)
            elif held_ms:
                await queue.postpone(user_key, held_ms)
            else:
                return job_id
        return None

    async def claim(self, job_id: JobId, lease_s: float, token: str = "") -> Lease | None:
        """Claim a job that is queued or whose lease has expired; return None otherwise.

        A job that was tried `MAX_TRIES` times fails instead. To repeat a call after a lost answer, pass the same token.
        """
        token, lease_ms = token or secrets.token_hex(16), round(lease_s * 1000)
        arguments = (token, lease_ms, MAX_TRIES, _TRIES_EXHAUSTED)
        if not await self._connection.write(_CLAIM, (keys.job(*job_id),), *arguments):
            return None
        job = await self.job(job_id)
        if job is None:
            return None
        await self._queue(job.bank).postpone(job_id.user_key, lease_ms)
        return Lease(job, token)

    async def renew(self, lease: Lease, lease_s: float, *, step: int, of: int, curve: Curve | None = None) -> bool:
        """Extend a lease and record progress; False if it is no longer valid. No `curve`: keep the old one."""
        queue, lease_ms = self._queue(lease.job.bank), round(lease_s * 1000)
        shown = (step, of, b"" if curve is None else orjson.dumps(curve))
        if not await self._connection.write(_RENEW, (keys.job(*lease.job.id),), lease.token, lease_ms, *shown):
            queue.forget_score(lease.job.id.user_key)
            return False
        await queue.postpone(lease.job.id.user_key, lease_ms)
        return True

    async def release(self, lease: Lease, *, counts: bool) -> bool:
        """Hand a job to another worker; False if the lease is no longer valid. `counts`: count the run as a try."""
        queue, arguments = self._queue(lease.job.bank), (lease.token, 0 if counts else -1)
        released = bool(await self._connection.write(_RELEASE, (keys.job(*lease.job.id),), *arguments))
        await queue.postpone(lease.job.id.user_key, 0)  # also if an earlier call released it, whose answer was lost
        queue.forget_score(lease.job.id.user_key)
        return released

    async def end(self, lease: Lease, trained: Trained) -> bool:
        """End a job without an adapter; return False if the lease is no longer valid."""
        done = bool(await self._connection.write(_END, (keys.job(*lease.job.id),), _outcome(lease, trained)))
        if done:
            await self._queue(lease.job.bank).remove(lease.job.id.user_key)
        return done

    async def promote(self, lease: Lease, trained: Trained, made: AdapterVersion, raw: bytes, *, at_most: int) -> bool:
        """End a job with an adapter, which serves from then on, in one atomic step; `at_most` versions stay.

        Returns False if the lease or the record has changed, the user was erased, or the job is for another bank.
        """
        user_key, bank = lease.job.id.user_key, bank_of(made.note.recipe)
        kept = await self._adapters.kept(user_key)
        if kept.profile is None:
            return False
        # Add the user first: an extra member is harmless, but a missing one would never be adapted again.
        await self._adapters.add_adapted(user_key, bank)
        given = _outcome(lease, trained, bank=bank, **kept.promotion(made, at_most))
        names = (keys.job(*lease.job.id), keys.profile(user_key), keys.adapter(user_key), keys.epoch(user_key))
        raws = (kept.record, encode_profile(replace(kept.profile, adapter=made.note)), raw)
        done = bool(await self._connection.write(_END, names, given, *raws))
        await self._adapters.settle_adapted(user_key, bank, written=done)
        if done:
            await self._queue(lease.job.bank).remove(user_key)
        return done

    async def queue_again(self, user_key: str) -> None:
        """Queue a user whose newest job is open, for a restored store, whose queues are older than the job."""
        for job in (await self.jobs(user_key))[-1:]:
            if not job.state.ended:
                await self._queue(job.bank).add(user_key)

    async def backlog(self, bank: str) -> Backlog:
        return await self._queue(bank).backlog()

    async def remove_erased(self, user_key: str, bank: str) -> None:
        queue = self._queue(bank)
        await queue.remember_score(user_key)
        if await self._adapters.has_jobs(user_key):  # the user has come back
            queue.forget_score(user_key)
        else:
            await queue.remove(user_key)

    async def open_job(self, user_key: str, bank: str) -> tuple[JobId | None, int]:
        """Return a user's open job for a bank, and the remaining lease time in ms."""
        last = await self._connection.run(lambda redis: redis.hget(keys.jobs(user_key), "last"))
        if last is None:
            return None, 0
        job_id = JobId(user_key, int(last))  # a key for the script: while a slot moves, the two may be on two servers
        state, job_bank, held_ms = await self._connection.evaluate(_OPEN, (keys.job(*job_id),))
        if state is None or job_bank != bank.encode():
            return None, 0
        with corrupt_if_undecodable():
            ended = JobState(state.decode()).ended
        return None if ended else job_id, held_ms


def _as_given(user_key: str, submission: Submission) -> dict[str, Any]:
    """Return a submission without its samples, as the scripts take it."""
    more = {"prefix": keys.job_prefix(user_key), "kept": KEPT_JOBS, "token": submission.token}
    return asdict(replace(submission, samples=())) | more


def _outcome(lease: Lease, trained: Trained, **of_adapter: Any) -> bytes:
    fields = {name: "" if value is None else str(value) for name, value in asdict(trained).items()}
    return orjson.dumps({"token": lease.token, "adapter": "", **fields, **of_adapter})


def _decoded(job_id: JobId, values: list[bytes | None]) -> Job | None:
    if values[0] is None:
        return None
    texts = {name: (value or b"").decode() for name, value in zip(_FIELDS, values, strict=True)}
    fields: dict[str, Any] = {name: texts[name] for name in _STRINGS}
    fields |= {name: int(texts[name] or 0) for name in _INTEGERS}
    fields |= {name: float(texts[name]) if texts[name] else None for name in _LOSSES}
    state, curve = JobState(texts["state"]), decode_curve(texts["curve"])
    return Job(job_id, state, curve=curve, idempotency_key=texts["key"], **fields)
