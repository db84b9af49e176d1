"""Jobs and samples on Redis (keys: `server/store/redis/keys.py`).

A job's hash holds its record (`_FIELDS`); the submission's `token` and `epoch`; `lease`, `lease_until` and
`lease_ms` while a worker has it; and the token that it was `ended_by`. Only a user's newest job is ever open: so the
queue of a bank (`queue.py`) holds user keys, and a look at a user is one at that job.
"""

from __future__ import annotations

import logging
import secrets
import time
from typing import Any

import orjson

from adapters.recipe import parse_recipe
from server.errors import Unavailable, UserErased
from server.store.adapters import StoredAdapter
from server.store.jobs import KEPT_JOBS, KEPT_S, MAX_TRIES, Backlog, Job, JobId, JobState, Lease, Submission, Trained
from server.store.profile_record import encode_profile
from server.store.profiles import Profile
from server.store.redis import job_scripts as scripts
from server.store.redis import keys
from server.store.redis.adapters import RedisAdapters
from server.store.redis.queue import RedisQueue
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
_TEXTS = ("config", "bank", "adapter", "error", "traceparent")
_WHOLE = ("created_ms", "started_ms", "ended_ms", "tries", "step", "of")
_LOSSES = ("loss", "before", "after")
_FIELDS = ("state", "curve", "key", *_TEXTS, *_WHOLE, *_LOSSES)


class RedisJobs:
    """`server.store.jobs.JobStore` on Redis."""

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._adapters = RedisAdapters(connection)
        self._queues: dict[str, RedisQueue] = {}

    async def submit(self, user_key: str, submission: Submission, max_samples: int) -> Job | None:
        queue = self._queue(submission.bank)
        # Before there is a job: a look in vain does no harm, a job that nobody looks at would wait for ever.
        listing = await queue.enlist(user_key, background=submission.background)
        given = {
            "prefix": keys.job_prefix(user_key),
            "number_before": secrets.randbelow(_FIRST_NUMBERS),
            "kept": KEPT_JOBS,
            "kept_s": KEPT_S,
            "until_ms": listing.until_ms,
            "epoch": submission.epoch,
            "key": submission.idempotency_key,
            "token": submission.token,
            "bank": submission.bank,
            "config": submission.config,
            "append": submission.append,
            "max_samples": max_samples,
            "traceparent": submission.traceparent,
        }
        names = (keys.jobs(user_key), keys.samples(user_key), keys.epoch(user_key))
        number = int(await self._connection.write(scripts.SUBMIT, names, orjson.dumps(given), *submission.samples))
        job = await self.job(JobId(user_key, number)) if number > 0 else None
        if job is not None and job.state is JobState.QUEUED:
            await queue.call(user_key, listing, background=submission.background)
        else:
            await queue.unlist(listing)
        if number == _LATE:
            raise Unavailable("the store took too long to accept the samples: send the request again")
        if job is None and number != _TOO_MANY:
            raise UserErased
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

    async def next_job(self, bank: str, wait_s: float) -> JobId | None:
        queue, until_s = self._queue(bank), time.monotonic() + wait_s
        while (user_key := await queue.take(until_s)) is not None:
            try:
                job_id, held_ms = await self._look(user_key, bank)
            except Unavailable as error:
                if error.code != "store_corrupt":
                    raise
                log.error("%s: %s", user_key, error.explained)
                continue  # taking it has moved it on: nobody else waits for it
            if job_id is None:
                await queue.close(user_key)
            elif held_ms:
                await queue.move(user_key, held_ms)
            else:
                return job_id
        return None

    async def claim(self, job_id: JobId, lease_s: float, token: str = "") -> Lease | None:
        token, lease_ms = token or secrets.token_hex(16), round(lease_s * 1000)
        arguments = (token, lease_ms, MAX_TRIES, _NEVER_ENDED, KEPT_S)
        if not await self._connection.write(scripts.CLAIM, (keys.job(job_id),), *arguments):
            return None
        job = await self.job(job_id)
        if job is None:
            return None
        await self._queue(job.bank).move(job_id.user_key, lease_ms)
        return Lease(job, token)

    async def renew(
        self, lease: Lease, lease_s: float, *, step: int, of: int, loss: float | None, curve: Curve | None = None
    ) -> bool:
        queue, lease_ms = self._queue(lease.job.bank), round(lease_s * 1000)
        shown = (step, of, _text(loss), b"" if curve is None else encode_curve(curve))
        if not await self._connection.write(scripts.RENEW, (keys.job(lease.job.id),), lease.token, lease_ms, *shown):
            queue.leave(lease.job.id.user_key)
            return False
        await queue.move(lease.job.id.user_key, lease_ms)
        return True

    async def release(self, lease: Lease, *, counts: bool) -> bool:
        queue, arguments = self._queue(lease.job.bank), (lease.token, 0 if counts else -1)
        released = bool(await self._connection.write(scripts.RELEASE, (keys.job(lease.job.id),), *arguments))
        if released:
            await queue.move(lease.job.id.user_key, 0)
        queue.leave(lease.job.id.user_key)
        return released

    async def end(self, lease: Lease, trained: Trained) -> bool:
        given = orjson.dumps(_outcome(lease, trained))
        done = bool(await self._connection.write(scripts.END, (keys.job(lease.job.id),), given))
        if done:
            await self._queue(lease.job.bank).close(lease.job.id.user_key)
        return done

    async def promote(
        self, lease: Lease, trained: Trained, profile: Profile, version: bytes, raw: StoredAdapter
    ) -> bool:
        user_key, bank = lease.job.id.user_key, parse_recipe(raw.recipe).bank
        # Before the promotion: an extra user on the list does no harm, a missing one would never be adapted again.
        await self._adapters.list_adapted(user_key, bank)
        given = _outcome(lease, trained) | {"adapter": raw.id, "bank": bank, "recipe": raw.recipe, "sha256": raw.sha256}
        names = (keys.job(lease.job.id), keys.profile(user_key), keys.adapter(user_key), keys.epoch(user_key))
        raws = (version, encode_profile(profile), raw.raw)
        done = bool(await self._connection.write(scripts.PROMOTE, names, orjson.dumps(given), *raws))
        if done:
            await self._adapters.forget_adapted(user_key, but=bank)
            await self._queue(lease.job.bank).close(user_key)
        elif await self._newest(user_key) is None:  # erased meanwhile
            await self._adapters.forget_adapted(user_key)
        return done

    async def backlog(self, bank: str) -> Backlog:
        return await self._queue(bank).backlog()

    async def withdraw(self, user_key: str, bank: str) -> None:
        queue = self._queue(bank)
        await queue.see(user_key)
        if await self._newest(user_key) is None:
            await queue.close(user_key)
        else:  # they are back already
            queue.leave(user_key)

    def _queue(self, bank: str) -> RedisQueue:
        if bank not in self._queues:
            self._queues[bank] = RedisQueue(self._connection, "jobs", bank)
        return self._queues[bank]

    async def _look(self, user_key: str, bank: str) -> tuple[JobId | None, int]:
        """A user's open job of a bank, and for how many ms a worker still has it."""
        name, prefix = keys.jobs(user_key), keys.job_prefix(user_key)
        found = await self._connection.run(lambda redis: redis.eval(scripts.LOOK, 1, name, prefix))
        if not found:
            return None, 0
        number, state, of_bank, held_ms = found
        if state is None or of_bank != bank.encode():
            return None, 0
        with readable():
            ended = JobState(state.decode()).ended
        return None if ended else JobId(user_key, int(number)), held_ms

    async def _newest(self, user_key: str) -> JobId | None:
        """The user's newest job; None for a user without any."""
        last = await self._connection.run(lambda redis: redis.hget(keys.jobs(user_key), "last"))
        return JobId(user_key, int(last)) if last is not None else None


def _outcome(lease: Lease, trained: Trained) -> dict[str, object]:
    return {
        "token": lease.token,
        "state": trained.state.value,
        "before": _text(trained.before),
        "after": _text(trained.after),
        "error": trained.error,
        "adapter": "",
        "kept_s": KEPT_S,
    }


def _text(loss: float | None) -> str:
    return "" if loss is None else repr(loss)


def _decoded(job_id: JobId, values: list[bytes | None]) -> Job | None:
    if values[0] is None:
        return None
    texts = {name: (value or b"").decode() for name, value in zip(_FIELDS, values, strict=True)}
    fields: dict[str, Any] = {name: texts[name] for name in _TEXTS}
    fields |= {name: int(texts[name] or 0) for name in _WHOLE}
    fields |= {name: float(texts[name]) if texts[name] else None for name in _LOSSES}
    state, curve = JobState(texts["state"]), decode_curve(texts["curve"])
    return Job(job_id, state, curve=curve, idempotency_key=texts["key"], **fields)
