"""The queue of jobs on Redis: it wakes workers, and remembers when somebody should look after a job.

Keys that all users share::

    mta:wake   stream   job ids; read by a consumer group, an entry goes when it is read
    mta:open   zset     job id → when somebody should look whether it is still going on, ms

An entry of the stream can be lost with the worker that read it: then the job's time in `mta:open` comes.
"""

from __future__ import annotations

from redis.exceptions import ResponseError

from server.errors import Unavailable
from server.store.jobs import JobId, parse_job_id
from server.store.redis_connection import WRITE_TIMEOUT_S, RedisConnection

WAKE, OPEN, GROUP = "mta:wake", "mta:open", "workers"
GRACE_MS = 10_000
"""After so long without a worker a job is announced again."""

_BATCH = 100


class RedisQueue:
    """Job ids on their way to workers; the records themselves are `RedisJobs`'s.

    Args:
        connection: shared with the records.
    """

    def __init__(self, connection: RedisConnection) -> None:
        self._connection = connection
        self._has_group = False

    async def announce(self, job_id: JobId) -> None:
        """Wake a worker for a job."""
        await self.look_again(job_id, await self.now_ms())
        await self._connection.run(lambda redis: redis.xadd(WAKE, {"job": str(job_id)}), WRITE_TIMEOUT_S)

    async def next(self, worker: str, wait_s: float) -> JobId | None:
        """Wait for a job id; what comes twice or not at all is the records' and `due`'s to mend."""
        await self._make_group()
        block_ms = max(1, round(wait_s * 1000))
        try:
            streams = await self._connection.run(
                lambda redis: redis.xreadgroup(GROUP, worker, {WAKE: ">"}, count=1, block=block_ms, noack=True),
                wait_s + WRITE_TIMEOUT_S,
            )
        except Unavailable:
            self._has_group = False  # whatever comes back may be another server
            raise
        if not streams:
            return None
        entry, fields = streams[0][1][0]
        await self._connection.run(lambda redis: redis.xdel(WAKE, entry))
        return parse_job_id(fields[b"job"].decode())

    async def waiting(self) -> int:
        """How many entries no worker has read yet."""
        return int(await self._connection.run(lambda redis: redis.xlen(WAKE)))

    async def due(self, now_ms: int) -> list[JobId]:
        """The first jobs that should be looked after by now."""
        members = await self._connection.run(
            lambda redis: redis.zrangebyscore(OPEN, "-inf", now_ms, start=0, num=_BATCH)
        )
        return [job_id for job_id in (parse_job_id(member.decode()) for member in members) if job_id is not None]

    async def look_again(self, job_id: JobId, after_ms: int) -> None:
        """Look after a job once the grace is over, counted from a Unix time in milliseconds."""
        at_ms = after_ms + GRACE_MS
        await self._connection.run(lambda redis: redis.zadd(OPEN, {str(job_id): at_ms}), WRITE_TIMEOUT_S)

    async def close(self, job_id: JobId) -> None:
        """Look after a job no more."""
        await self._connection.run(lambda redis: redis.zrem(OPEN, str(job_id)), WRITE_TIMEOUT_S)

    async def open_jobs(self) -> int:
        """How many jobs are looked after."""
        return int(await self._connection.run(lambda redis: redis.zcard(OPEN)))

    async def now_ms(self) -> int:
        """The server's clock: leases of all workers are measured by it."""
        seconds, micros = await self._connection.run(lambda redis: redis.time())
        return int(seconds) * 1000 + int(micros) // 1000

    async def _make_group(self) -> None:
        if self._has_group:
            return
        try:
            await self._connection.run(lambda redis: redis.xgroup_create(WAKE, GROUP, id="0", mkstream=True))
        except Unavailable as error:
            if not (isinstance(error.__cause__, ResponseError) and "BUSYGROUP" in str(error.__cause__)):
                raise
        self._has_group = True
