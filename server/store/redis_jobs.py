"""Jobs, samples and user adapters on Redis.

Keys, all of one user in one cluster slot::

    mta:{<user key>}:jobs      hash     `last` → number of the newest job; `key:<idempotency key>` → number
    mta:{<user key>}:job:<n>   hash     the record (`_FIELDS`), with `lease` and `lease_until` while a worker has it
    mta:{<user key>}:samples   list     encoded samples, the oldest first
    mta:{<user key>}:adapter   hash     id, recipe, sha256, raw

and two that all users share::

    mta:adapted                set      banks that user adapters were trained on
    mta:adapted:<bank>         set      keys of the users whose adapter was

Workers are woken by the queue `mta:jobs` beside them (`redis_queue`). `overdue` walks what is due there, not the keys.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from adapters.recipe import parse_recipe
from server.store import redis_scripts as scripts
from server.store.jobs import (
    KEPT_JOBS,
    KEPT_S,
    MAX_TRIES,
    Job,
    JobId,
    JobState,
    Lease,
    StoredAdapter,
    Submission,
    Trained,
    parse_job_id,
)
from server.store.profiles import Profile
from server.store.records import encode_profile
from server.store.redis_connection import WRITE_TIMEOUT_S, RedisConnection, user_prefix
from server.store.redis_queue import RedisQueue

BANKS = "mta:adapted"
_BATCH = 100
_DIED = (
    f"the worker died {MAX_TRIES} times while it trained this job, most likely for want of memory: send fewer or "
    "shorter samples, or give the worker more; its log says what it died of"
)
_FIELDS = (
    "state", "config", "created_ms", "started_ms", "ended_ms", "tries", "step", "of", "loss", "before", "after",
    "adapter", "error",
)  # fmt: skip


class RedisJobs:
    """`server.store.jobs.JobStore` on Redis.

    Args:
        connection: checked, or to be checked before the first write.
    """

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._queue = RedisQueue(connection, "jobs")

    async def submit(self, user_key: str, submission: Submission, max_samples: int) -> Job | None:
        prefix = user_prefix(user_key)
        number = await self._connection.write(
            scripts.SUBMIT,
            (f"{prefix}jobs", f"{prefix}samples"),
            f"{prefix}job:",
            submission.idempotency_key,
            submission.config,
            int(submission.append),
            max_samples,
            KEPT_JOBS,
            KEPT_S,
            *submission.samples,
        )
        if not number:
            return None
        job_id = JobId(user_key, int(number))
        job = await self.job(job_id)
        if job is not None and not job.state.ended:
            await self._queue.announce(str(job_id))
        return job

    async def job(self, job_id: JobId) -> Job | None:
        values = await self._connection.run(lambda redis: redis.hmget(_job(job_id), _FIELDS))
        return _decoded(job_id, values)

    async def cancel(self, job_id: JobId) -> tuple[Job | None, bool]:
        ended = await self._connection.write(scripts.CANCEL, (_job(job_id),), KEPT_S)
        await self._queue.close(str(job_id))
        return await self.job(job_id), bool(ended)

    async def samples(self, user_key: str) -> list[bytes]:
        name = f"{user_prefix(user_key)}samples"
        return list(await self._connection.run(lambda redis: redis.lrange(name, 0, -1), WRITE_TIMEOUT_S))

    async def next_job(self, worker: str, wait_s: float) -> JobId | None:
        name = await self._queue.next(worker, wait_s)
        return parse_job_id(name) if name is not None else None

    async def claim(self, job_id: JobId, lease_s: float) -> Lease | None:
        token = secrets.token_hex(16)
        taken = await self._connection.write(
            scripts.CLAIM, (_job(job_id),), token, round(lease_s * 1000), MAX_TRIES, _DIED, KEPT_S
        )
        if taken < 0:
            await self._queue.close(str(job_id))
        job = await self.job(job_id) if taken == 1 else None
        return Lease(job, token) if job is not None else None

    async def renew(self, lease: Lease, lease_s: float, *, step: int, of: int, loss: float | None) -> bool:
        arguments = (lease.token, round(lease_s * 1000), step, of, "" if loss is None else repr(loss))
        return bool(await self._connection.write(scripts.RENEW, (_job(lease.job.id),), *arguments))

    async def release(self, lease: Lease, *, counts: bool) -> bool:
        arguments = (lease.token, 0 if counts else -1)
        released = bool(await self._connection.write(scripts.RELEASE, (_job(lease.job.id),), *arguments))
        if released:
            await self._queue.announce(str(lease.job.id))
        return released

    async def end(self, lease: Lease, trained: Trained) -> bool:
        done = await self._connection.write(scripts.END, (_job(lease.job.id),), lease.token, *_outcome(trained, ""))
        await self._queue.close(str(lease.job.id))
        return bool(done)

    async def promote(
        self, lease: Lease, trained: Trained, profile: Profile, version: bytes, raw: StoredAdapter
    ) -> bool:
        prefix = user_prefix(lease.job.id.user_key)
        bank = parse_recipe(raw.recipe).bank
        async with self._connection.pipeline(transaction=False, timeout_s=WRITE_TIMEOUT_S) as pipe:
            # Before the promotion: a user too many on the list does no harm, one too few would never be adapted again.
            await pipe.sadd(BANKS, bank).sadd(_adapted(bank), lease.job.id.user_key).execute()
        done = await self._connection.write(
            scripts.PROMOTE,
            (_job(lease.job.id), f"{prefix}profile", f"{prefix}adapter"),
            lease.token,
            *_outcome(trained, raw.id),
            version,
            encode_profile(profile),
            raw.recipe,
            raw.sha256,
            raw.raw,
        )
        if done:
            await self._queue.close(str(lease.job.id))
        return bool(done)

    async def adapter(self, user_key: str, adapter_id: str) -> StoredAdapter | None:
        fields = ("id", "recipe", "sha256", "raw")
        values = await self._connection.run(lambda redis: redis.hmget(_adapter(user_key), fields), WRITE_TIMEOUT_S)
        if values[0] is None or values[0].decode() != adapter_id:
            return None
        return StoredAdapter(adapter_id, values[1].decode(), values[2].decode(), values[3])

    async def lend(self, user_key: str, stored: StoredAdapter, ttl_s: int) -> None:
        """Put an adapter where engines look for it, without a job and for a while: for an evaluation."""
        fields = {"id": stored.id, "recipe": stored.recipe, "sha256": stored.sha256, "raw": stored.raw}
        async with self._connection.pipeline(transaction=True, timeout_s=WRITE_TIMEOUT_S) as pipe:
            pipe.hset(_adapter(user_key), mapping=fields)
            pipe.expire(_adapter(user_key), ttl_s)
            await pipe.execute()

    async def adapter_id(self, user_key: str) -> str | None:
        value = await self._connection.run(lambda redis: redis.hget(_adapter(user_key), "id"))
        return value.decode() if value is not None else None

    async def adapted(self) -> dict[str, int]:
        banks = await self._connection.run(lambda redis: redis.smembers(BANKS))
        names = sorted(value.decode() for value in banks)
        return {name: await self._adapted_count(name) for name in names}

    async def adapted_users(self, bank: str) -> AsyncIterator[str]:
        cursor = 0
        while True:
            cursor, members = await self._scan_adapted(bank, cursor)
            for member in members:
                yield member.decode()
            if cursor == 0:
                return

    async def forget_adapted(self, user_key: str, bank: str | None = None) -> None:
        banks = [bank] if bank else list(await self.adapted())
        async with self._connection.pipeline(transaction=False, timeout_s=WRITE_TIMEOUT_S) as pipe:
            for name in banks:
                pipe.srem(_adapted(name), user_key)
            await pipe.execute()

    async def open_jobs(self) -> int:
        return await self._queue.open_count()

    async def overdue(self) -> list[JobId]:
        now_ms, waiting = await self._queue.now_ms(), await self._queue.waiting()
        announced = []
        for name in await self._queue.due(now_ms):
            job_id = parse_job_id(name)
            if job_id is None:
                continue
            state, lease_until = await self._standing(job_id)
            if state is None or state.ended:
                await self._queue.close(str(job_id))
            elif lease_until > now_ms:
                await self._queue.look_again(str(job_id), lease_until)
            elif waiting and state is JobState.QUEUED:
                await self._queue.look_again(str(job_id), now_ms)  # its turn may well come: a worker is behind
            else:
                await self._queue.announce(str(job_id))
                announced.append(job_id)
        return announced

    async def _adapted_count(self, bank: str) -> int:
        return int(await self._connection.run(lambda redis: redis.scard(_adapted(bank))))

    async def _scan_adapted(self, bank: str, cursor: int) -> tuple[int, list[bytes]]:
        """Some users on the list of a bank, and where to go on; 0 at its end."""
        after, members = await self._connection.run(lambda redis: redis.sscan(_adapted(bank), cursor, count=_BATCH))
        return int(after), members

    async def _standing(self, job_id: JobId) -> tuple[JobState | None, int]:
        """A job's state, None without a record, and when its lease runs out, ms."""
        fields = ("state", "lease_until")
        state, lease_until = await self._connection.run(lambda redis: redis.hmget(_job(job_id), fields))
        return JobState(state.decode()) if state is not None else None, int(lease_until or 0)


@asynccontextmanager
async def jobs_at(redis_url: str) -> AsyncIterator[RedisJobs]:
    """The jobs of a store, durable or not, for as long as a block runs."""
    connection = RedisConnection(redis_url, require_durable=False)
    try:
        yield RedisJobs(connection)
    finally:
        await connection.close()


def _adapted(bank: str) -> str:
    return f"mta:adapted:{bank}"


def _adapter(user_key: str) -> str:
    return f"{user_prefix(user_key)}adapter"


def _job(job_id: JobId) -> str:
    return f"{user_prefix(job_id.user_key)}job:{job_id.number}"


def _outcome(trained: Trained, adapter: str) -> tuple[object, ...]:
    losses = ("" if loss is None else repr(loss) for loss in (trained.before, trained.after))
    return (trained.state.value, *losses, trained.error, adapter, KEPT_S)


def _decoded(job_id: JobId, values: list[bytes | None]) -> Job | None:
    if values[0] is None:
        return None
    texts: Mapping[str, str] = {name: (value or b"").decode() for name, value in zip(_FIELDS, values, strict=True)}
    whole = {name: int(texts[name] or 0) for name in ("created_ms", "started_ms", "ended_ms", "tries", "step", "of")}
    losses: dict[str, Any] = {n: float(texts[n]) if texts[n] else None for n in ("loss", "before", "after")}
    state = JobState(texts["state"])
    return Job(job_id, state, texts["config"], adapter=texts["adapter"], error=texts["error"], **whole, **losses)
