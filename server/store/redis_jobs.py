"""Jobs, samples and user adapters on Redis.

Keys, all of one user in one cluster slot::

    mta:{<user key>}:jobs      hash     `last` → number of the newest job; `key:<idempotency key>` → number
    mta:{<user key>}:job:<n>   hash     the record (`_FIELDS`), with `lease` and `lease_until` while a worker has it
    mta:{<user key>}:samples   list     encoded samples, the oldest first
    mta:{<user key>}:adapter   hash     id, recipe, sha256, raw

and some that all users share::

    mta:wake                   stream   job ids; read by a consumer group, an entry goes when it is read
    mta:open                   zset     job id → when somebody should look whether it is still going on, ms
    mta:adapted                set      banks that user adapters were trained on
    mta:adapted:<bank>         set      keys of the users whose adapter was

An entry of the stream can be lost with the worker that read it. `overdue` walks what is due in `mta:open`, never the
keys, and announces it again.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping
from typing import Any

from redis.exceptions import ResponseError

from adapters.recipe import parse_recipe
from server.errors import Unavailable
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

WAKE, OPEN, GROUP, BANKS = "mta:wake", "mta:open", "workers", "mta:adapted"
GRACE_MS = 10_000
"""After so long without a worker a job is announced again."""

_BATCH = 100
_DIED = (
    f"the worker died {MAX_TRIES} times while it trained this job, most likely for want of memory: send fewer or "
    "shorter samples, or give the worker more"
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
        self._has_group = False

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
            await self._announce(job_id)
        return job

    async def job(self, job_id: JobId) -> Job | None:
        async with self._connection.pipeline(transaction=False) as pipe:
            (values,) = await pipe.hmget(_job(job_id), _FIELDS).execute()
        return _decoded(job_id, values)

    async def cancel(self, job_id: JobId) -> tuple[Job | None, bool]:
        ended = await self._connection.write(scripts.CANCEL, (_job(job_id),), KEPT_S)
        await self._close(job_id)
        return await self.job(job_id), bool(ended)

    async def samples(self, user_key: str) -> list[bytes]:
        async with self._connection.pipeline(transaction=False, timeout_s=WRITE_TIMEOUT_S) as pipe:
            (samples,) = await pipe.lrange(f"{user_prefix(user_key)}samples", 0, -1).execute()
        return list(samples)

    async def next_job(self, worker: str, wait_s: float) -> JobId | None:
        await self._make_group()
        try:
            async with self._connection.pipeline(transaction=False, timeout_s=wait_s + WRITE_TIMEOUT_S) as pipe:
                pipe.xreadgroup(GROUP, worker, {WAKE: ">"}, count=1, block=max(1, round(wait_s * 1000)), noack=True)
                (streams,) = await pipe.execute()
        except Unavailable:
            self._has_group = False  # whatever comes back may be another server
            raise
        if not streams:
            return None
        entry, fields = streams[0][1][0]
        async with self._connection.pipeline(transaction=False) as pipe:
            await pipe.xdel(WAKE, entry).execute()
        return parse_job_id(fields[b"job"].decode())

    async def claim(self, job_id: JobId, lease_s: float) -> Lease | None:
        token = secrets.token_hex(16)
        taken = await self._connection.write(
            scripts.CLAIM, (_job(job_id),), token, round(lease_s * 1000), MAX_TRIES, _DIED, KEPT_S
        )
        if taken < 0:
            await self._close(job_id)
        job = await self.job(job_id) if taken == 1 else None
        return Lease(job, token) if job is not None else None

    async def renew(self, lease: Lease, lease_s: float, *, step: int, of: int, loss: float | None) -> bool:
        arguments = (lease.token, round(lease_s * 1000), step, of, "" if loss is None else repr(loss))
        return bool(await self._connection.write(scripts.RENEW, (_job(lease.job.id),), *arguments))

    async def end(self, lease: Lease, trained: Trained) -> bool:
        done = await self._connection.write(scripts.END, (_job(lease.job.id),), lease.token, *_outcome(trained, ""))
        await self._close(lease.job.id)
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
            await self._close(lease.job.id)
        return bool(done)

    async def adapter(self, user_key: str, adapter_id: str) -> StoredAdapter | None:
        async with self._connection.pipeline(transaction=False, timeout_s=WRITE_TIMEOUT_S) as pipe:
            (values,) = await pipe.hmget(f"{user_prefix(user_key)}adapter", ("id", "recipe", "sha256", "raw")).execute()
        if values[0] is None or values[0].decode() != adapter_id:
            return None
        return StoredAdapter(adapter_id, values[1].decode(), values[2].decode(), values[3])

    async def adapter_id(self, user_key: str) -> str | None:
        async with self._connection.pipeline(transaction=False) as pipe:
            (value,) = await pipe.hget(f"{user_prefix(user_key)}adapter", "id").execute()
        return value.decode() if value is not None else None

    async def adapted(self) -> dict[str, int]:
        async with self._connection.pipeline(transaction=False) as pipe:
            (banks,) = await pipe.smembers(BANKS).execute()
        counts = {}
        for bank in sorted(value.decode() for value in banks):
            async with self._connection.pipeline(transaction=False) as pipe:
                (counts[bank],) = await pipe.scard(_adapted(bank)).execute()
        return counts

    async def adapted_users(self, bank: str) -> AsyncIterator[str]:
        cursor = 0
        while True:
            async with self._connection.pipeline(transaction=False) as pipe:
                ((cursor, members),) = await pipe.sscan(_adapted(bank), cursor, count=_BATCH).execute()
            for member in members:
                yield member.decode()
            if int(cursor) == 0:
                return

    async def forget_adapted(self, user_key: str, bank: str | None = None) -> None:
        banks = [bank] if bank else list(await self.adapted())
        async with self._connection.pipeline(transaction=False, timeout_s=WRITE_TIMEOUT_S) as pipe:
            for name in banks:
                pipe.srem(_adapted(name), user_key)
            await pipe.execute()

    async def open_jobs(self) -> int:
        async with self._connection.pipeline(transaction=False) as pipe:
            (count,) = await pipe.zcard(OPEN).execute()
        return int(count)

    async def overdue(self) -> list[JobId]:
        now = await self._now_ms()
        async with self._connection.pipeline(transaction=False) as pipe:
            pipe.zrangebyscore(OPEN, "-inf", now, start=0, num=_BATCH).xlen(WAKE)
            due, waiting = await pipe.execute()
        announced = []
        for member in due:
            job_id = parse_job_id(member.decode())
            if job_id is None:
                continue
            async with self._connection.pipeline(transaction=False) as pipe:
                (values,) = await pipe.hmget(_job(job_id), ("state", "lease_until")).execute()
            state, lease_until = values[0], int(values[1] or 0)
            if state is None or JobState(state.decode()).ended:
                await self._close(job_id)
            elif lease_until > now:
                await self._look_again(job_id, lease_until + GRACE_MS)
            elif waiting and state == b"queued":
                await self._look_again(job_id, now + GRACE_MS)  # its turn may well come: a worker is behind
            else:
                await self._announce(job_id)
                announced.append(job_id)
        return announced

    async def _announce(self, job_id: JobId) -> None:
        await self._look_again(job_id, await self._now_ms() + GRACE_MS)
        async with self._connection.pipeline(transaction=False, timeout_s=WRITE_TIMEOUT_S) as pipe:
            await pipe.xadd(WAKE, {"job": str(job_id)}).execute()

    async def _look_again(self, job_id: JobId, at_ms: int) -> None:
        async with self._connection.pipeline(transaction=False, timeout_s=WRITE_TIMEOUT_S) as pipe:
            await pipe.zadd(OPEN, {str(job_id): at_ms}).execute()

    async def _close(self, job_id: JobId) -> None:
        async with self._connection.pipeline(transaction=False, timeout_s=WRITE_TIMEOUT_S) as pipe:
            await pipe.zrem(OPEN, str(job_id)).execute()

    async def _now_ms(self) -> int:
        """The server's clock: leases of all workers are measured by it."""
        async with self._connection.pipeline(transaction=False) as pipe:
            ((seconds, micros),) = await pipe.time().execute()
        return int(seconds) * 1000 + int(micros) // 1000

    async def _make_group(self) -> None:
        if self._has_group:
            return
        async with self._connection.pipeline(transaction=False) as pipe:
            pipe.xgroup_create(WAKE, GROUP, id="0", mkstream=True)
            (answer,) = await pipe.execute(raise_on_error=False)
        if isinstance(answer, ResponseError) and "BUSYGROUP" not in str(answer):
            raise answer
        self._has_group = True


def _adapted(bank: str) -> str:
    return f"mta:adapted:{bank}"


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
