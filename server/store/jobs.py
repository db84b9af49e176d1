"""The store's port for adapt jobs: their records, and the samples they train on.

The record is the truth about a job. A queue for each bank says when to look at whose: a look too many does no harm.
Each call that changes a job is one atomic step on its user's keys, and may be repeated if its answer was lost.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from server.store.adapters import StoredAdapter
from server.store.profiles import Profile
from server.store.samples import NO_CURVE, Curve

KEPT_JOBS = 20
"""How many of a user's newest jobs are remembered."""

KEPT_S = 7 * 24 * 3600
"""How long an ended job is remembered."""

MAX_TRIES = 3
_JOB_ID = re.compile(r"([a-z2-7]{26})\.([1-9][0-9]{0,9})")


class JobState(StrEnum):
    """A job's state; all but the first two are final."""

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


@dataclass(frozen=True, slots=True)
class JobId:
    """`<user key>.<number>`: locates the job's keys, and says nothing about who the user is.

    A user's first number is random, the next is one more: numbers from before an erasure do not come again.
    """

    user_key: str
    number: int

    def __str__(self) -> str:
        return f"{self.user_key}.{self.number}"


def parse_job_id(text: str) -> JobId | None:
    """The job id that a text is, if it is one."""
    match = _JOB_ID.fullmatch(text)
    return JobId(match[1], int(match[2])) if match else None


@dataclass(frozen=True, slots=True)
class Job:
    """A job's record. Times are Unix time in ms, 0 until it happens; texts are empty where there is nothing to say.

    Attributes:
        config: how to train, as JSON.
        bank: the bank (8 hex digits) that it trains for.
        tries: how often a worker has claimed it.
        step, of: training progress, over all its runs.
        loss: of the last step, nats per output token.
        before, after: held-out loss of the fused adapter alone, and with the trained adapter.
        adapter: id of the promoted user adapter.
        error: why it failed, for people.
        traceparent: of the request's trace.
    """

    id: JobId
    state: JobState
    config: str
    created_ms: int
    bank: str
    started_ms: int = 0
    ended_ms: int = 0
    tries: int = 0
    step: int = 0
    of: int = 0
    loss: float | None = None
    curve: Curve = NO_CURVE
    before: float | None = None
    after: float | None = None
    adapter: str = ""
    error: str = ""
    traceparent: str = ""
    idempotency_key: str = ""


@dataclass(frozen=True, slots=True)
class Submission:
    """A request for a job.

    Attributes:
        samples: each encoded on its own; duplicates are kept once.
        append: whether they are added to the kept ones or replace them.
        config: as JSON.
        bank: the bank (8 hex digits) to train for.
        epoch: the user's when the request began (`server/store/profiles.py`).
        idempotency_key: the same key gives the same job, while that is remembered; empty for none.
        traceparent: of the request's trace; empty if that is not traced.
        background: whether nobody asked for it: it is trained when nothing else is due.
    """

    samples: Sequence[bytes]
    append: bool
    config: str
    bank: str
    epoch: str = ""
    idempotency_key: str = ""
    traceparent: str = ""
    background: bool = False

    @property
    def token(self) -> str:
        """Identifies a repeated submission: it gets the user's newest job if that has this token and has not ended
        without success."""
        digest = hashlib.sha256(f"{self.bank}\0{int(self.append)}\0{self.config}".encode())
        for sample in self.samples:
            digest.update(hashlib.sha256(sample).digest())
        return digest.hexdigest()[:32]


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's right to a job, for as long as the job's record holds the same token."""

    job: Job
    token: str


@dataclass(frozen=True, slots=True)
class Trained:
    """How training ended, to be written if the lease still holds.

    Attributes:
        state: `succeeded`, `rejected` or `failed`.
        before, after: held-out losses; None when it failed.
        error: why it failed, for people; empty otherwise.
    """

    state: JobState
    before: float | None = None
    after: float | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Backlog:
    """About how much a bank's workers have to do.

    Attributes:
        open: jobs that have not ended.
        waiting: those of them that no worker has.
        oldest_s: how long the first of these has waited; 0 without one.
    """

    open: int
    waiting: int
    oldest_s: float


class JobStore(Protocol):
    """Keeps jobs and samples. Every method raises `Unavailable` when the store cannot be used."""

    async def submit(self, user_key: str, submission: Submission, max_samples: int) -> Job | None:
        """Store samples and create the job that trains on them; older jobs of the user end as superseded.

        Returns:
            The job, on disk and in the queue; the existing one for a repeated submission; None if there would be more
            than `max_samples`.

        Raises:
            UserErased: when the user has been erased since the request began.
        """

    async def job(self, job_id: JobId) -> Job | None:
        """A job's record, if it is remembered."""

    async def jobs(self, user_key: str) -> list[Job]:
        """A user's jobs that are remembered, oldest first."""

    async def cancel(self, job_id: JobId) -> tuple[Job | None, bool]:
        """Cancel a job; returns the job as it is now, and whether this call ended it."""

    async def samples(self, user_key: str) -> list[bytes]:
        """The samples kept for a user, oldest first."""

    async def next_job(self, bank: str, wait_s: float) -> JobId | None:
        """Wait for a job of a bank that needs a worker: a new one, or one whose worker has died.

        Others find it again a few seconds later, unless it is claimed by then.
        """

    async def claim(self, job_id: JobId, lease_s: float, token: str = "") -> Lease | None:
        """Take a job that is queued, or whose lease has run out; None if there is nothing to do.

        A job that has been tried `MAX_TRIES` times ends as failed. Pass the same token again if the answer was lost; it
        is generated if empty.
        """

    async def renew(
        self, lease: Lease, lease_s: float, *, step: int, of: int, loss: float | None, curve: Curve | None = None
    ) -> bool:
        """Extend a lease and note how far training is; False if it no longer holds. No `curve`: it is as it was."""

    async def release(self, lease: Lease, *, counts: bool) -> bool:
        """Have another worker take a job, at once; False if the lease no longer holds.

        `counts` says whether this was one of the job's tries.
        """

    async def end(self, lease: Lease, trained: Trained) -> bool:
        """End a job without an adapter; False if the lease no longer holds."""

    async def promote(
        self, lease: Lease, trained: Trained, profile: Profile, version: bytes, raw: StoredAdapter
    ) -> bool:
        """End a job with an adapter, which replaces the user's previous one, all in one step.

        `profile` is the user's record with the adapter noted in it, made from the record `version`.

        Returns:
            False if the lease no longer holds, the user's record has changed meanwhile, the user has been erased since
            the job was requested, or the job is for another bank.
        """

    async def backlog(self, bank: str) -> Backlog:
        """How much there is to do."""

    async def withdraw(self, user_key: str, bank: str) -> None:
        """Remove an erased user from a bank's queue."""
