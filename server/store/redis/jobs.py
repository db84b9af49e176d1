"""Jobs and samples on Redis (keys: `server/store/redis/keys.py`).

A job's hash holds its record (`_FIELDS`); the submission's `token` and `epoch`; `lease`, `lease_until` and
`lease_ms` while a worker has it; and the token that it was `ended_by`. Workers are woken by a separate queue per bank
(`queue.py`), which holds user keys: only a user's newest job is ever open. `overdue` walks what is due there, not the
jobs.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Any

from adapters.recipe import parse_recipe
from server.errors import Unavailable, UserErased
from server.store.adapters import StoredAdapter
from server.store.jobs import KEPT_JOBS, KEPT_S, MAX_TRIES, Job, JobId, JobState, Lease, Submission, Trained
from server.store.profile_record import encode_profile
from server.store.profiles import Profile
from server.store.redis import job_scripts as scripts
from server.store.redis import keys
from server.store.redis.adapters import RedisAdapters
from server.store.redis.queue import LISTED_MS, RedisQueue
from server.store.redis.servers.base import WRITE_TIMEOUT_S
from server.store.redis.servers.connection import RedisConnection, readable
from server.store.samples import Curve, decode_curve, encode_curve

log = logging.getLogger("mta.store")

_TOO_MANY, _ERASED, _LATE = 0, -1, -2
_FIRST_NUMBERS = 1 << 32
"""A user's first job has one of so many numbers, since nothing remembers those of before an erasure."""
_NEVER_ENDED = (
    f"this job was begun {MAX_TRIES} times and never ended, most likely since its workers died for lack of memory: "
    "send fewer or shorter samples, or give workers more; or its record is damaged: send the samples again. "
    "The workers' logs say which"
)
_FIELDS = (
    "state", "config", "bank", "created_ms", "started_ms", "ended_ms", "tries", "step", "of", "loss", "before", "after",
    "adapter", "error", "curve", "traceparent", "key",
)  # fmt: skip
_WHOLE = ("created_ms", "started_ms", "ended_ms", "tries", "step", "of")


class RedisJobs:
    """`server.store.jobs.JobStore` on Redis.

    Args:
        connection: checked, or to be checked before the first write.
    """

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._adapters = RedisAdapters(connection)
        self._queues: dict[str, RedisQueue] = {}

    async def submit(self, user_key: str, submission: Submission, max_samples: int) -> Job | None:
        queue = self._queue(submission.bank)
        # Before there is a job: an extra user in the queue does no harm, a missing one would wait for ever.
        listed_ms = await queue.enlist(user_key)
        number = await self._connection.write(
            scripts.SUBMIT,
            (keys.jobs(user_key), keys.samples(user_key), keys.epoch(user_key)),
            keys.job_prefix(user_key),
            submission.idempotency_key,
            submission.token,
            submission.epoch,
            listed_ms + LISTED_MS,
            submission.bank,
            submission.config,
            int(submission.append),
            max_samples,
            KEPT_JOBS,
            KEPT_S,
            submission.traceparent,
            secrets.randbelow(_FIRST_NUMBERS),
            *submission.samples,
        )
        if number == _TOO_MANY:
            return None
        if number == _ERASED:
            raise UserErased
        if number == _LATE:
            raise Unavailable("the store took too long to accept the samples: send the request again")
        job = await self.job(JobId(user_key, int(number)))
        if job is None:
            raise UserErased
        if not job.state.ended:
            await queue.call(user_key, listed_ms)
        return job

    async def job(self, job_id: JobId) -> Job | None:
        values = await self._connection.run(lambda redis: redis.hmget(keys.job(job_id), _FIELDS))
        with readable():
            return _decoded(job_id, values)

    async def jobs(self, user_key: str) -> list[Job]:
        newest = await self._newest(user_key)
        if newest is None:
            return []
        oldest = max(1, newest.number - KEPT_JOBS + 1)
        ids = [JobId(user_key, number) for number in range(oldest, newest.number + 1)]
        async with self._connection.pipeline() as pipe:
            for job_id in ids:
                pipe.hmget(keys.job(job_id), _FIELDS)
            found = await pipe.execute()
        with readable():
            jobs = [_decoded(job_id, values) for job_id, values in zip(ids, found, strict=True)]
        return [job for job in jobs if job is not None]

    async def cancel(self, job_id: JobId) -> tuple[Job | None, bool]:
        ended = await self._connection.write(scripts.CANCEL, (keys.job(job_id),), secrets.token_hex(16), KEPT_S)
        return await self.job(job_id), bool(ended)

    async def samples(self, user_key: str) -> list[bytes]:
        name = keys.samples(user_key)
        return list(await self._connection.run(lambda redis: redis.lrange(name, 0, -1), WRITE_TIMEOUT_S))

    async def next_job(self, bank: str, worker: str, wait_s: float) -> JobId | None:
        queue = self._queue(bank)
        while (user_key := await queue.next(worker, wait_s)) is not None:
            newest = await self._newest(user_key)
            if newest is not None and await self._is_for(newest, bank):
                return newest
            await queue.acknowledge(user_key)  # erased, or has requested a job of another bank since
        return None

    async def claim(self, job_id: JobId, lease_s: float, token: str = "") -> Lease | None:
        token = token or secrets.token_hex(16)
        taken = await self._connection.write(
            scripts.CLAIM, (keys.job(job_id),), token, round(lease_s * 1000), MAX_TRIES, _NEVER_ENDED, KEPT_S
        )
        job = await self.job(job_id) if taken == 1 else None
        for queue in self._queues.values():  # from here on the lease says when to check again
            await queue.acknowledge(job_id.user_key)
        return Lease(job, token) if job is not None else None

    async def renew(
        self, lease: Lease, lease_s: float, *, step: int, of: int, loss: float | None, curve: Curve | None = None
    ) -> bool:
        shown = ("" if loss is None else repr(loss), b"" if curve is None else encode_curve(curve))
        arguments = (lease.token, round(lease_s * 1000), step, of, *shown)
        return bool(await self._connection.write(scripts.RENEW, (keys.job(lease.job.id),), *arguments))

    async def release(self, lease: Lease, *, counts: bool) -> bool:
        arguments = (lease.token, 0 if counts else -1)
        released = bool(await self._connection.write(scripts.RELEASE, (keys.job(lease.job.id),), *arguments))
        if released:
            await self._queue(lease.job.bank).call(lease.job.id.user_key)
        return released

    async def end(self, lease: Lease, trained: Trained) -> bool:
        queue, user_key = self._queue(lease.job.bank), lease.job.id.user_key
        appointment = await queue.appointment(user_key)
        done = await self._connection.write(scripts.END, (keys.job(lease.job.id),), lease.token, *_outcome(trained, ""))
        if done:
            await queue.close(user_key, appointment)
        return bool(done)

    async def promote(
        self, lease: Lease, trained: Trained, profile: Profile, version: bytes, raw: StoredAdapter
    ) -> bool:
        queue, user_key = self._queue(lease.job.bank), lease.job.id.user_key
        bank, appointment = parse_recipe(raw.recipe).bank, await queue.appointment(user_key)
        # Before the promotion: an extra user on the list does no harm, a missing one would never be adapted again.
        await self._adapters.list_adapted(user_key, bank)
        done = await self._connection.write(
            scripts.PROMOTE,
            (keys.job(lease.job.id), keys.profile(user_key), keys.adapter(user_key), keys.epoch(user_key)),
            lease.token,
            *_outcome(trained, raw.id),
            version,
            encode_profile(profile),
            bank,
            raw.recipe,
            raw.sha256,
            raw.raw,
        )
        if done:
            await self._adapters.forget_adapted(user_key, but=bank)
            await queue.close(user_key, appointment)
        elif await self._newest(user_key) is None:  # erased meanwhile
            await self._adapters.forget_adapted(user_key)
        return bool(done)

    async def open_jobs(self, bank: str) -> int:
        return await self._queue(bank).open_count()

    async def waiting_jobs(self, bank: str) -> int:
        return await self._queue(bank).waiting_count()

    async def oldest_waiting_s(self, bank: str) -> float:
        return await self._queue(bank).oldest_s()

    async def overdue(self, bank: str) -> list[JobId]:
        queue, announced = self._queue(bank), []
        await queue.tidy()
        async for user_key, appointment, now_ms in queue.due():
            try:
                job_id = await self._open_job(user_key, bank, now_ms)
                if job_id is None:
                    await queue.close(user_key, appointment)
                elif isinstance(job_id, int):
                    await queue.look_again(user_key, job_id)
                elif await queue.call(user_key):
                    announced.append(job_id)
            except Unavailable as error:
                if error.code != "store_corrupt":
                    raise
                log.error("%s: %s", user_key, error.explained)
                await queue.look_again(user_key, now_ms)  # so that nobody else waits for it
        return announced

    async def withdraw(self, user_key: str, bank: str) -> None:
        queue = self._queue(bank)
        appointment = await queue.appointment(user_key)
        if await self._newest(user_key) is None:  # else they are back already
            await queue.close(user_key, appointment)

    async def _open_job(self, user_key: str, bank: str, now_ms: int) -> JobId | int | None:
        """A user's job of a bank if it needs a worker; if one has it, when its lease runs out (ms); None without."""
        newest = await self._newest(user_key)
        if newest is None or not await self._is_for(newest, bank):
            return None
        state, lease_until, lease_ms = await self._standing(newest)
        if state is None or state.ended:
            return None
        # A lease with more time left than its whole length was given before the clock was set back.
        return lease_until if now_ms < lease_until <= now_ms + lease_ms else newest

    def _queue(self, bank: str) -> RedisQueue:
        if bank not in self._queues:
            self._queues[bank] = RedisQueue(self._connection, "jobs", bank)
        return self._queues[bank]

    async def _newest(self, user_key: str) -> JobId | None:
        """The user's newest job; None for a user without any."""
        last = await self._connection.run(lambda redis: redis.hget(keys.jobs(user_key), "last"))
        return JobId(user_key, int(last)) if last is not None else None

    async def _is_for(self, job_id: JobId, bank: str) -> bool:
        """Whether a job is for a bank; those of version 0.1 are for any."""
        found = await self._connection.run(lambda redis: redis.hget(keys.job(job_id), "bank"))
        return found is None or found.decode() == bank

    async def _standing(self, job_id: JobId) -> tuple[JobState | None, int, int]:
        """A job's state (None without a record), when its lease runs out, and how long the lease is, ms."""
        fields = ("state", "lease_until", "lease_ms")
        state, until, lease_ms = await self._connection.run(lambda redis: redis.hmget(keys.job(job_id), fields))
        lease_until = int(until or 0)
        with readable():
            return JobState(state.decode()) if state is not None else None, lease_until, int(lease_ms or lease_until)


def _outcome(trained: Trained, adapter: str) -> tuple[object, ...]:
    losses = ("" if loss is None else repr(loss) for loss in (trained.before, trained.after))
    return (trained.state.value, *losses, trained.error, adapter, KEPT_S)


def _decoded(job_id: JobId, values: list[bytes | None]) -> Job | None:
    if values[0] is None:
        return None
    texts: Mapping[str, str] = {name: (value or b"").decode() for name, value in zip(_FIELDS, values, strict=True)}
    taken: dict[str, Any] = {name: texts[name] for name in ("config", "bank", "adapter", "error", "traceparent")}
    taken |= {name: int(texts[name] or 0) for name in _WHOLE}
    taken |= {name: float(texts[name]) if texts[name] else None for name in ("loss", "before", "after")}
    curve = decode_curve(texts["curve"])
    return Job(job_id, JobState(texts["state"]), curve=curve, idempotency_key=texts["key"], **taken)
