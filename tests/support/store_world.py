"""A store with all who use it, and what is known of it: what a model of its promises is made of."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import redis

from bench.rig.cluster import ask
from bench.rig.valkey import FAKE_TIME
from bench.rig.watched import WatchedValkey
from server.errors import ApiError
from server.store.jobs import JobId, JobState
from server.store.profiles import Snapshot
from server.store.redis import keys
from tests.support.store_parts import BANK, KEYS, Fault, StoreParts, WorkerSteps

T = TypeVar("T")
QUEUES = [name for work in ("jobs", "sign") for name in keys.queue(work, BANK)[:2]]


@dataclass
class Expected:
    """What is known of a user."""

    text: str | None = None  # of their item; None for an unknown user
    erasures: int = 0
    was_nobody: bool = False  # there was nothing to be erased the last time
    newest: int = 0  # number of the newest job
    former: frozenset[int] = frozenset()  # numbers of the jobs that went with an erasure
    acknowledged: set[int] = field(default_factory=set)  # jobs answered with 2xx, of a user not erased since


@dataclass(frozen=True)
class UnderWay:
    """A profile write that has begun."""

    user: str
    text: str
    snapshot: Snapshot
    erasures: int
    jumped_s: float  # by how much the clock had been set forward by then, in all


class StoreWorld:
    """Two gateways, two workers, two users, one store that Sentinel watches, which holds nothing at first."""

    steps: ClassVar[int] = 0  # how often anything was tried, in all worlds

    def __init__(self, server: WatchedValkey) -> None:
        self.server = server
        self.loop = asyncio.Runner()
        self._raw = [redis.Redis.from_url(each.url) for each in server.servers]
        self.full = False
        self.fill(full=False)
        self.raw.flushall()
        self.ahead_s = 0.0
        if FAKE_TIME:
            server.set_clock(0)
        self.gateways = [self.connected() for _ in range(2)]
        self.workers = [WorkerSteps(self.connected()) for _ in range(2)]
        self.users = {user: Expected() for user in ("ada", "bob")}
        self.ended: dict[JobId, JobState] = {}
        self.revoked: dict[str, bool] = {}  # by an API key's digest

    @property
    def raw(self) -> redis.Redis:
        return self._raw[self.server.servers.index(self.server.primary)]

    def fill(self, *, full: bool) -> None:
        self.full = full
        for server in self.server.servers:
            ask(server, "CONFIG SET", "maxmemory", ask(server, "INFO", "memory")["used_memory"] // 2 if full else 0)

    def fail_over(self, *, lost: bool) -> None:
        """The replica takes over; what is known to be so still is."""
        self.server.fail_over(lost=lost)
        if FAKE_TIME:
            self.server.set_clock(self.ahead_s)
        self.fill(full=self.full)  # a server that was started anew has forgotten it
        for user, expected in self.users.items():
            assert self.text_of(user) == expected.text
            assert self.newest(user) == expected.newest
            self.observe(user)
        self.check_keys()

    def check_keys(self) -> None:
        """Every API key that was made is there, and revoked if it was."""
        ring = self.run(self.gateways[0].keys.all())
        assert {key.digest: key.revoked_ms is not None for key in ring.keys} == self.revoked

    def connected(self) -> StoreParts:
        parts = StoreParts(self.server.url)
        self.run(parts.connection.check())
        return parts

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(work)

    def tried(
        self, parts: StoreParts, work: Coroutine[Any, Any, T], fault: Fault | None = None, place: int = 0
    ) -> T | ApiError:
        """Do something, one of its writes failing; what came of it."""
        StoreWorld.steps += 1
        parts.connection.fail(fault, place)
        try:
            return self.run(work)
        except ApiError as error:
            return error
        finally:
            parts.connection.fail(None)

    def settle(self) -> None:
        """Let a worker do whatever is to be done, until nothing is."""
        worker = WorkerSteps(self.connected())
        for _ in range(40):
            self._let_time_pass()
            self.run(worker.take())
            self.run(worker.claim())
            if worker.lease:
                self.run(worker.reject())
                worker.lease = None
            self.run(worker.take_signing())
            if worker.signing:
                self.run(worker.sign())
            if not self.raw.exists(*QUEUES):
                break
        else:
            raise AssertionError("something is open for ever")
        for user in self.users:
            if self.text_of(user) is None:  # as `mta readapt` does
                self.run(worker.parts.adapters.remove_adapted(KEYS.key(user)))
        self.gateways.append(worker.parts)

    def _let_time_pass(self) -> None:
        """Let leases and reservations expire; postponed users become due."""
        if FAKE_TIME:
            self.ahead_s += 100
            self.server.set_clock(self.ahead_s)
            return
        for name in self.raw.keys("mta:*:job:*"):
            if self.raw.hexists(name, "lease"):
                self.raw.hset(name, "lease_until", 1)
        for name in QUEUES:
            for member in self.raw.zrange(name, 0, -1):
                self.raw.zadd(name, {member: 0})

    async def close(self) -> None:
        for parts in (*self.gateways, *(worker.parts for worker in self.workers)):
            await parts.connection.close()

    def text_of(self, user: str) -> str | None:
        """What the store holds of a user; whole or not at all."""
        snapshot = self.run(self.gateways[0].profiles.read(KEYS.key(user)))
        assert (snapshot.profile is None) == (not snapshot.items)
        return snapshot.items["it"].fields["text"] if snapshot.items else None

    def newest(self, user: str) -> int:
        key = KEYS.key(user)
        last = self.raw.hget(f"mta:{{{key}}}:jobs", "last")
        return int(last) if last else self.users[user].newest

    def states(self, user: str) -> dict[int, JobState]:
        key = KEYS.key(user)
        names = self.raw.keys(f"mta:{{{key}}}:job:*")
        return {int(name.rsplit(b":", 1)[1]): JobState(self.raw.hget(name, "state").decode()) for name in names}

    def end_as(self, user: str, numbers: set[int], state: JobState) -> None:
        """Somebody was told that these jobs ended, or they had to: for the first time."""
        for number in numbers:
            job_id = JobId(KEYS.key(user), number)
            assert self.ended.setdefault(job_id, state) is state
            assert self.states(user).get(number, state) is state

    def observe(self, user: str) -> None:
        for number, state in self.states(user).items():
            if state.ended:
                assert self.ended.setdefault(JobId(KEYS.key(user), number), state) is state

    def everything(self) -> list[str]:
        """Names of keys, and names within what all users share."""
        names = [name.decode() for name in self.raw.scan_iter()]
        for name in names.copy():
            kind = self.raw.type(name)
            if "{" in name and not name.startswith(("mta:{jobs", "mta:{sign")):
                continue
            if kind == b"zset":
                names += [f"{name}/{member.decode()}" for member in self.raw.zrange(name, 0, -1)]
            elif kind == b"set":
                names += [f"{name}/{member.decode()}" for member in self.raw.smembers(name)]
            elif kind == b"hash":
                names += [f"{name}/{member.decode()}" for member in self.raw.hkeys(name)]
        return names
