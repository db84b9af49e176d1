"""The store's promises as a model: whatever dies, is lost or comes late, in whatever order, against a real Valkey.

No acknowledged write is lost. Nothing of an erased user is left but their tombstone, and nothing that was under way
brings them back. Every acknowledged job ends, and ends once. `--hypothesis-profile=long` takes 25 times as many steps.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from server.errors import ApiError, Unavailable, UserErased
from server.store.jobs import KEPT_JOBS, JobId, JobState, Submission
from server.store.profiles import Snapshot
from tests.support.faults import Fault
from tests.support.store_parts import BANK, KEYS, StoreParts, WorkerSteps, put_of
from tests.support.valkey import FAKE_TIME, ValkeyProcess

T = TypeVar("T")
USERS = st.sampled_from(["ada", "bob"])
TWO = st.integers(0, 1)
FAULTS = st.one_of(st.none(), st.none(), st.sampled_from(Fault))
PLACES = st.integers(0, 4)
JUMPS_S = st.sampled_from([1.0, 11.0, 16.0, 61.0, 3600.0, -5.0, -3600.0])
MOST_AHEAD_S = 3 * 24 * 3600  # below a tombstone's life: whatever is under way ends long before that
STEPS = {"default": 2_000, "long": 50_000}
STEPS_A_RUN = 50


@dataclass
class Expected:
    """What is known of a user.

    Attributes:
        text: of their item; None for an unknown user.
        erasures: how often they were erased.
        newest: number of the newest job.
        acknowledged: jobs that were answered with 2xx and whose user was not erased since.
    """

    text: str | None = None
    erasures: int = 0
    newest: int = 0
    acknowledged: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class UnderWay:
    """A profile write that has begun."""

    user: str
    text: str
    snapshot: Snapshot
    erasures: int


taken_steps = 0
server: ValkeyProcess


@pytest.fixture(scope="module", autouse=True)
def one_server() -> Iterator[None]:
    """In memory: what a disk would add to this test is time."""
    global server  # noqa: PLW0603  hypothesis makes the machine without arguments
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    server = ValkeyProcess(folder, clock=FAKE_TIME is not None).start()
    yield
    server.kill()


class Store(RuleBasedStateMachine):
    """Two gateways, two workers, two users, one Valkey."""

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.Runner()
        self.ahead_s = 0.0
        self.raw = redis.Redis.from_url(server.url)
        self.raw.flushall()
        if FAKE_TIME:
            server.set_clock(0)
        self.gateways = [self.connected() for _ in range(2)]
        self.workers = [WorkerSteps(self.connected()) for _ in range(2)]
        self.users = {user: Expected() for user in ("ada", "bob")}
        self.under_way: list[UnderWay] = []
        self.ended: dict[JobId, JobState] = {}
        self.texts = 0

    def connected(self) -> StoreParts:
        parts = StoreParts(server.url)
        self.run(parts.connection.check())
        return parts

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.loop.run(work)

    def tried(
        self, parts: StoreParts, work: Coroutine[Any, Any, T], fault: Fault | None = None, place: int = 0
    ) -> T | ApiError:
        """Do something, one of its writes failing; what came of it."""
        global taken_steps  # noqa: PLW0603
        taken_steps += 1
        parts.connection.fail(fault, place)
        try:
            return self.run(work)
        except ApiError as error:
            return error
        finally:
            parts.connection.fail(None)

    @rule(user=USERS, gateway=TWO)
    def begin_a_put(self, user: str, gateway: int) -> None:
        self.texts += 1
        snapshot = self.run(self.gateways[gateway].profiles.read(KEYS.key(user)))
        self.under_way.append(UnderWay(user, f"text {self.texts}", snapshot, self.users[user].erasures))

    @precondition(lambda self: self.under_way)
    @rule(which=st.integers(0, 9), gateway=TWO, fault=FAULTS)
    def finish_a_put(self, which: int, gateway: int, fault: Fault | None) -> None:
        put = self.under_way.pop(which % len(self.under_way))
        parts, expected = self.gateways[gateway], self.users[put.user]
        change = put_of(put.user, put.text, put.snapshot)
        work = parts.profiles.commit(KEYS.key(put.user), put.snapshot.version, change, put.snapshot.epoch)
        outcome = self.tried(parts, work, fault)
        found = self.text_of(put.user)
        if expected.erasures > put.erasures:
            assert isinstance(outcome, UserErased | Unavailable)
            assert found == expected.text
        elif outcome is True:
            assert found == put.text
        elif outcome is False:
            assert found == expected.text
        else:
            assert found in (expected.text, put.text)
        expected.text = found
        if outcome is True:
            self.tried(parts, parts.signing.ask(KEYS.key(put.user)))

    @rule(user=USERS, gateway=TWO, sample=st.integers(0, 2), append=st.booleans(), fault=FAULTS, place=PLACES)
    def adapt(self, *, user: str, gateway: int, sample: int, append: bool, fault: Fault | None, place: int) -> None:
        parts, expected, key = self.gateways[gateway], self.users[user], KEYS.key(user)
        before = self.states(user)
        epoch = self.run(parts.profiles.epoch(key))
        submission = Submission([b"sample %d" % sample], append, "{}", BANK, epoch)
        outcome = self.tried(parts, parts.jobs.submit(key, submission, 100), fault, place % 3)
        newest = self.newest(user)
        assert newest in (expected.newest, expected.newest + 1)
        assert outcome is not None
        if not isinstance(outcome, ApiError):
            assert outcome.id == JobId(key, newest)
            expected.acknowledged.add(newest)
        if newest == expected.newest:
            assert self.states(user) == before
        else:
            self.end_as(user, {n for n, state in before.items() if not state.ended}, JobState.SUPERSEDED)
        expected.newest = newest

    @rule(user=USERS, gateway=TWO, fault=FAULTS, place=PLACES)
    def adapt_while_erased(self, user: str, gateway: int, fault: Fault | None, place: int) -> None:
        """A submission whose user is erased after it has begun."""
        parts, key = self.gateways[gateway], KEYS.key(user)
        epoch = self.run(parts.profiles.epoch(key))
        self.erase(user, 1 - gateway, None, 0)
        submission = Submission([b"sample"], False, "{}", BANK, epoch)
        outcome = self.tried(parts, parts.jobs.submit(key, submission, 100), fault, place % 3)
        assert isinstance(outcome, UserErased | Unavailable)
        assert self.run(parts.jobs.samples(key)) == []

    @rule(user=USERS, gateway=TWO, fault=FAULTS, place=PLACES)
    def erase(self, user: str, gateway: int, fault: Fault | None, place: int) -> None:
        parts, expected, key = self.gateways[gateway], self.users[user], KEYS.key(user)
        before = self.run(parts.profiles.epoch(key))
        outcome = self.tried(parts, parts.erase(user), fault, place)
        if self.run(parts.profiles.epoch(key)) == before:
            assert isinstance(outcome, ApiError)
            return
        self.ended = {job: state for job, state in self.ended.items() if job.user_key != key}
        self.users[user] = Expected(erasures=expected.erasures + 1, newest=expected.newest)
        assert [name for name in self.raw.keys(f"*{key}*") if not name.endswith(b":epoch")] == []
        if not isinstance(outcome, ApiError):
            again = self.tried(parts, parts.erase(user))
            assert again == outcome

    @rule(user=USERS, gateway=TWO, fault=FAULTS)
    def cancel(self, user: str, gateway: int, fault: Fault | None) -> None:
        parts, key = self.gateways[gateway], KEYS.key(user)
        job_id = JobId(key, max(1, self.users[user].newest))
        outcome = self.tried(parts, parts.jobs.cancel(job_id), fault)
        if not isinstance(outcome, ApiError) and outcome[1]:
            self.end_as(user, {job_id.number}, JobState.CANCELLED)
        self.observe(user)

    @rule(worker=TWO, fault=FAULTS, place=PLACES)
    def take_and_claim(self, worker: int, fault: Fault | None, place: int) -> None:
        steps = self.workers[worker]
        if steps.lease is None:
            self.tried(steps.parts, steps.take())
            self.tried(steps.parts, steps.claim(), fault, place % 2)

    @precondition(lambda self: any(worker.lease for worker in self.workers))
    @rule(worker=TWO, promote=st.booleans(), fault=FAULTS, place=PLACES)
    def finish_a_job(self, worker: int, promote: bool, fault: Fault | None, place: int) -> None:
        steps = self.workers[worker]
        if steps.lease is None:
            return
        job_id = steps.lease.job.id
        user = next(user for user in self.users if KEYS.key(user) == job_id.user_key)
        outcome = self.tried(steps.parts, steps.promote() if promote else steps.reject(), fault, place % 2)
        steps.lease = None
        if outcome and not isinstance(outcome, ApiError):
            self.end_as(user, {job_id.number}, JobState.SUCCEEDED if promote else JobState.REJECTED)
        self.observe(user)

    @precondition(lambda self: any(worker.lease for worker in self.workers))
    @rule(worker=TWO, counts=st.booleans(), gives_back=st.booleans(), fault=FAULTS, place=PLACES)
    def go_on_or_give_back(self, worker: int, counts: bool, gives_back: bool, fault: Fault | None, place: int) -> None:
        steps = self.workers[worker]
        if steps.lease is None:
            return
        jobs, lease = steps.parts.jobs, steps.lease
        if gives_back:
            self.tried(steps.parts, jobs.release(lease, counts=counts), fault, place % 2)
            steps.lease = None
        else:
            self.tried(steps.parts, jobs.renew(lease, 15.0, step=1, of=2, loss=None), fault)

    @precondition(lambda self: FAKE_TIME is not None and any(worker.lease for worker in self.workers))
    @rule(worker=TWO, fault=FAULTS)
    def take_over(self, worker: int, fault: Fault | None) -> None:
        """A worker falls silent for longer than its lease, and lives on; the other takes the job up."""
        other = self.workers[1 - worker]
        if self.workers[worker].lease is not None and other.lease is None:
            self.jump(61.0)
            self.tried(other.parts, other.parts.jobs.overdue(BANK))
            self.take_and_claim(1 - worker, fault, 0)

    @rule(worker=TWO, fault=FAULTS, place=PLACES)
    def sign(self, worker: int, fault: Fault | None, place: int) -> None:
        steps = self.workers[worker]
        if steps.signing is None:
            self.tried(steps.parts, steps.take_signing())
        if steps.signing is not None:
            self.tried(steps.parts, steps.sign(), fault, place % 3)

    @rule(worker=TWO)
    def die(self, worker: int) -> None:
        """And start again under another name."""
        self.workers[worker] = WorkerSteps(self.connected())

    @rule(worker=TWO)
    def sweep(self, worker: int) -> None:
        parts = self.workers[worker].parts
        self.tried(parts, parts.jobs.overdue(BANK))
        self.tried(parts, parts.signing.overdue())

    @precondition(lambda self: FAKE_TIME is not None)
    @rule(by_s=JUMPS_S)
    def jump(self, by_s: float) -> None:
        """The store's clock is set forward or back."""
        self.ahead_s = min(MOST_AHEAD_S, max(-MOST_AHEAD_S, self.ahead_s + by_s))
        server.set_clock(self.ahead_s)

    def teardown(self) -> None:
        if not hasattr(self, "users"):
            return
        self.settle()
        for user, expected in self.users.items():
            key = KEYS.key(user)
            self.observe(user)
            assert self.text_of(user) == expected.text
            states = self.states(user)
            assert all(state.ended for state in states.values())  # acknowledged or not: none waits for ever
            assert {number for number in expected.acknowledged if number > expected.newest - KEPT_JOBS} <= states.keys()
            if expected.text is None and not states:
                assert [name for name in self.everything() if key in name] in ([], [f"mta:{{{key}}}:epoch"])
        self.loop.run(self.close())
        self.loop.close()

    def settle(self) -> None:
        """Let a worker do whatever is to be done, until nothing is."""
        worker = WorkerSteps(self.connected())
        for _ in range(40):
            if FAKE_TIME:
                self.ahead_s += 100
                server.set_clock(self.ahead_s)
            else:
                self.raw.delete(f"mta:{{jobs:{BANK}}}:listed")
                for name in (f"mta:{{jobs:{BANK}}}:open", f"mta:{{sign:{BANK}}}:open"):
                    for member in self.raw.zrange(name, 0, -1):
                        self.raw.zadd(name, {member: 0})
            self.run(worker.parts.jobs.overdue(BANK))
            self.run(worker.parts.signing.overdue())
            self.run(worker.take())
            self.run(worker.claim())
            if worker.lease:
                self.run(worker.reject())
                worker.lease = None
            self.run(worker.take_signing())
            if worker.signing:
                self.run(worker.sign())
            if not self.raw.zcard(f"mta:{{jobs:{BANK}}}:open") and not self.raw.zcard(f"mta:{{sign:{BANK}}}:open"):
                break
        else:
            raise AssertionError("something is open for ever")
        for user in self.users:
            if self.text_of(user) is None:  # as `mta readapt` does
                self.run(worker.parts.adapters.forget_adapted(KEYS.key(user)))
        self.gateways.append(worker.parts)

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
        """The state of every job that the store remembers."""
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
        """What has ended stays as it ended."""
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
            elif kind == b"stream":
                names += [f"{name}/{fields[b'id'].decode()}" for _, fields in self.raw.xrange(name)]
        return names


@pytest.mark.timeout(3600)
def test_the_store_keeps_its_promises_whatever_happens(request: pytest.FixtureRequest) -> None:
    profile = "long" if request.config.getoption("--hypothesis-profile") == "long" else "default"
    steps = STEPS[profile]
    run_state_machine_as_test(
        Store,
        settings=settings(
            max_examples=steps // STEPS_A_RUN * 5 // 4,
            stateful_step_count=STEPS_A_RUN,
            deadline=None,
            derandomize=profile == "default",
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{taken_steps} steps")
    assert taken_steps >= steps
