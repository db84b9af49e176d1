"""The store's promises as a model: whatever dies, is lost or comes late, in whatever order, against a real Valkey.

No acknowledged write is lost, also when a replica takes over. Nothing of an erased user is left but their tombstone, of
an unknown one nothing, and nothing that was under way brings them back, however late; the rewritten files do not hold
them. Every acknowledged job ends, and ends once. What a full store refuses changes nothing, and users are erased there.
`--hypothesis-profile=long` takes 25 times as many steps.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import pytest
import redis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from server.errors import ApiError, Unavailable, UserErased
from server.store import append_only_file
from server.store.jobs import KEPT_JOBS, JobId, JobState, Submission
from server.store.profiles import Snapshot
from server.store.redis import keys
from server.store.tenants.access_keys import Scope, access_key, new_secret
from tests.support.store_parts import BANK, KEYS, REPLICA_TIMEOUT_MS, Fault, StoreParts, WorkerSteps, on_disk, put_of
from tests.support.valkeys.clock import FAKE_TIME
from tests.support.valkeys.cluster import ask
from tests.support.valkeys.sentinels import WatchedValkey

T = TypeVar("T")
Work = Coroutine[Any, Any, T]
QUEUES = [name for work in ("jobs", "sign") for name in keys.queue(work, BANK)[:2]]
USERS = st.sampled_from(["ada", "bob"])
TWO, BOOL = st.integers(0, 1), st.booleans()
FAULTS = st.one_of(st.none(), st.none(), st.sampled_from(Fault))
PLACES = st.integers(0, 4)
JUMPS_S = st.sampled_from([1.0, 11.0, 16.0, 61.0, 3600.0, -5.0, -3600.0])
MOST_AHEAD_S = 3 * 24 * 3600  # below a tombstone's life: what is under way to a known user ends long before that
STEPS = {"default": 2_000, "long": 50_000}
STEPS_A_RUN = 50

server: WatchedValkey


@pytest.fixture(scope="module", autouse=True)
def one_server(memory: Path) -> Iterator[None]:
    global server  # noqa: PLW0603  hypothesis makes the machine without arguments
    server = WatchedValkey(memory / "model", clock=FAKE_TIME is not None).start()
    with pytest.MonkeyPatch.context() as patched:
        for name in ("INTERVAL_MS", "REWRITE_MS"):  # so that a file is rewritten as soon as it may hold erased data
            patched.setattr(append_only_file, name, 0)
        yield
    server.kill()


@dataclass
class Expected:  # of a user
    text: str | None = None  # of their item; None for an unknown user
    erasures: int = 0
    newest: int = 0  # number of the newest job
    former: frozenset[int] = frozenset()  # numbers of the jobs that went with an erasure
    acknowledged: set[int] = field(default_factory=set)  # jobs answered with 2xx, of a user not erased since


@dataclass(frozen=True)
class UnderWay:  # a profile write
    user: str
    text: str
    epoch: str
    snapshot: Snapshot
    erasures: int
    mark_lost: int  # as `Store.marks_lost` by then


class Store(RuleBasedStateMachine):
    """Two gateways, two workers, two users, one store of a primary and a replica, which takes over once in each run.

    Whether a rule can run must not depend on the servers' answers, or Hypothesis could not run the same steps again: a
    rule with nothing to do does nothing.
    """

    tries: ClassVar[int] = 0  # how often anything was tried, in all runs

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.Runner()
        self._raw = [redis.Redis.from_url(each.url) for each in server.servers]
        server.follow()  # a run that failed may have left the replica cut off
        self.set_full(full=False)
        self.raw.flushall()
        assert self.raw.wait(1, 60_000) == 1  # a replica that takes over at once has nothing of the run before either
        self.ahead_s = 0.0
        self.marks_lost = 0  # how often marks may have been lost, so that a write is refused without an erasure
        self.erased_texts: list[str] = []
        if FAKE_TIME:
            server.set_clock(0)
        self.gateways = [self.connected() for _ in range(2)]
        self.workers = [WorkerSteps(self.connected()) for _ in range(2)]
        self.users = {user: Expected() for user in ("ada", "bob")}
        self.ended: dict[JobId, JobState] = {}
        self.revoked: dict[str, bool] = {}  # by an API key's digest
        self.under_way: list[UnderWay] = []
        self.texts = 0
        self.failed_over = False

    @rule(user=USERS, gateway=TWO)
    def begin_a_put(self, user: str, gateway: int) -> None:
        epoch = self.begun(user, gateway)
        if epoch is not None:
            snapshot = self.run(self.gateways[gateway].profiles.read(KEYS.key(user)))
            erasures, text = self.users[user].erasures, self.new_text()
            self.under_way.append(UnderWay(user, text, epoch, snapshot, erasures, self.marks_lost))

    @rule(which=st.integers(0, 9), gateway=TWO, fault=FAULTS)
    def finish_a_put(self, which: int, gateway: int, fault: Fault | None) -> None:
        if not self.under_way:
            return
        put = self.under_way.pop(which % len(self.under_way))
        parts, expected = self.gateways[gateway], self.users[put.user]
        change = put_of(put.user, put.text, put.snapshot)
        work = parts.profiles.commit(KEYS.key(put.user), put.snapshot.version, change, put.epoch)
        outcome = self.tried(parts, work, fault)
        may_lack_its_mark = "+" in put.epoch and put.mark_lost < self.marks_lost
        found = self.text_of(put.user)
        if expected.erasures > put.erasures:
            assert isinstance(outcome, UserErased | Unavailable)
            assert found == expected.text
        elif outcome is True:
            assert found == put.text
        elif outcome is False or self.full or isinstance(outcome, UserErased):
            assert found == expected.text
            assert may_lack_its_mark or not isinstance(outcome, UserErased)
        else:
            assert found in (expected.text, put.text)
        assert not (self.full and outcome is True)
        expected.text = found
        if outcome is True:
            self.tried(parts, parts.to_sign.add(KEYS.key(put.user)))

    @rule(user=USERS, gateway=TWO, sample=TWO, append=BOOL, background=BOOL, fault=FAULTS, place=PLACES)
    def adapt(
        self, *, user: str, gateway: int, sample: int, append: bool, background: bool, fault: Fault | None, place: int
    ) -> None:
        parts, expected, key = self.gateways[gateway], self.users[user], KEYS.key(user)
        before, epoch = self.states(user), self.begun(user, gateway)
        if epoch is None:
            return
        submission = Submission([b"sample %d" % sample], append, "{}", BANK, epoch, background=background)
        outcome = self.tried(parts, parts.jobs.submit(key, submission, 100), fault, place % 3)
        newest = self.newest(user)
        assert newest in (expected.newest, expected.newest + 1) or (expected.newest == 0 and not before)
        assert newest not in expected.former
        assert not (self.full and newest > expected.newest)
        opened = {n for n, state in before.items() if not state.ended}
        if outcome is None:
            assert (background, newest, opened) == (True, expected.newest, {newest})
        elif not isinstance(outcome, ApiError):
            assert outcome.id == JobId(key, newest)
            expected.acknowledged.add(newest)
        if newest == expected.newest:
            assert self.states(user) == before
        else:
            assert not (background and opened)
            self.end_as(user, opened, JobState.SUPERSEDED)
        expected.newest = newest

    @rule(user=USERS, gateway=TWO, fault=FAULTS, place=PLACES)
    def adapt_while_erased(self, user: str, gateway: int, fault: Fault | None, place: int) -> None:
        parts, key = self.gateways[gateway], KEYS.key(user)
        epoch = self.begun(user, gateway)
        self.erase(user, 1 - gateway, None, 0)
        if epoch is None:
            return
        submission = Submission([b"sample"], False, "{}", BANK, epoch)
        outcome = self.tried(parts, parts.jobs.submit(key, submission, 100), fault, place % 3)
        assert isinstance(outcome, UserErased | Unavailable)
        assert self.run(parts.jobs.samples(key)) == []

    @rule(user=USERS, gateway=TWO, fault=FAULTS, place=PLACES)
    def erase(self, user: str, gateway: int, fault: Fault | None, place: int) -> None:
        parts, expected, key = self.gateways[gateway], self.users[user], KEYS.key(user)
        before, former = self.begun(user, gateway), expected.former | self.states(user).keys()
        kept = self.kept_of(user)
        outcome = self.tried(parts, parts.erase(user), fault, place)
        assert fault or not isinstance(outcome, ApiError)
        left = self.raw.hgetall(keys.epoch(key))
        if before is not None and self.begun(user, gateway) == before:
            assert isinstance(outcome, ApiError)
            return
        if before is None and isinstance(outcome, ApiError) and self.kept_of(user) == kept:
            return  # a full store gives nobody a mark, so only what is kept tells that the request never arrived
        assert not left or (b"mark" not in left and b"keys" in left)
        self.ended = {job: state for job, state in self.ended.items() if job.user_key != key}
        self.users[user] = Expected(None, expected.erasures + 1, former=former)
        self.erased_texts += [expected.text] if expected.text else []
        assert self.kept_of(user) == []
        if not isinstance(outcome, ApiError):
            assert self.tried(parts, parts.erase(user)) == outcome

    @rule(gateway=TWO)
    def rewrite_the_files(self, gateway: int) -> None:
        """No file holds an erased person once it was rewritten."""
        texts, self.erased_texts = self.erased_texts, []
        for _ in range(400):
            self.run(self.gateways[gateway].file.rewrite_if_due())
            if not any(on_disk(text, *server.servers) for text in texts):
                return
            time.sleep(0.01)
        raise AssertionError(texts)

    @rule(user=USERS, gateway=TWO, fault=FAULTS)
    def cancel(self, user: str, gateway: int, fault: Fault | None) -> None:
        parts, job_id = self.gateways[gateway], JobId(KEYS.key(user), max(1, self.users[user].newest))
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

    @rule(worker=TWO, promote=BOOL, fault=FAULTS, place=PLACES)
    def finish_a_job(self, worker: int, promote: bool, fault: Fault | None, place: int) -> None:
        steps = self.workers[worker]
        if steps.lease is not None:
            job_id = steps.lease.job.id
            user = next(user for user in self.users if KEYS.key(user) == job_id.user_key)
            outcome = self.tried(steps.parts, steps.promote() if promote else steps.reject(), fault, place % 2)
            steps.lease = None
            if outcome and not isinstance(outcome, ApiError):
                self.end_as(user, {job_id.number}, JobState.SUCCEEDED if promote else JobState.REJECTED)
            self.observe(user)

    @rule(user=USERS, gateway=TWO, number=st.integers(0, 2), fault=FAULTS, place=PLACES)
    def serve_another_version(self, user: str, gateway: int, number: int, fault: Fault | None, place: int) -> None:
        adapters, key = self.gateways[gateway].adapters, KEYS.key(user)
        found = self.run(adapters.kept(key))
        if number < len(found.versions) and found.versions[number] is not found.serving:
            work = adapters.serve(key, found, found.versions[number])
            outcome = self.tried(self.gateways[gateway], work, fault, place % 3)
            serving = self.run(adapters.kept(key)).serving
            assert outcome is True or isinstance(outcome, Unavailable)
            assert serving == found.versions[number] or (serving == found.serving and outcome is not True)
        self.observe(user)

    @rule(worker=TWO, counts=BOOL, gives_back=BOOL, fault=FAULTS, place=PLACES)
    def go_on_or_give_back(self, worker: int, counts: bool, gives_back: bool, fault: Fault | None, place: int) -> None:
        steps = self.workers[worker]
        if steps.lease is not None and gives_back:
            self.tried(steps.parts, steps.parts.jobs.release(steps.lease, counts=counts), fault, place % 2)
            steps.lease = None
        elif steps.lease is not None:
            self.tried(steps.parts, steps.parts.jobs.renew(steps.lease, 15.0, step=1, of=2), fault)

    @precondition(lambda self: FAKE_TIME is not None)
    @rule(worker=TWO, fault=FAULTS)
    def take_over(self, worker: int, fault: Fault | None) -> None:
        """A worker falls silent for longer than its lease, and lives on; the other takes the job up."""
        if self.workers[worker].lease is not None and self.workers[1 - worker].lease is None:
            self.jump(61.0)
            self.take_and_claim(1 - worker, fault, 0)

    @rule(worker=TWO, fault=FAULTS, place=PLACES)
    def sign(self, worker: int, fault: Fault | None, place: int) -> None:
        steps = self.workers[worker]
        if steps.signing is None:
            self.tried(steps.parts, steps.take_signing())
        if steps.signing is not None:
            self.tried(steps.parts, steps.sign(), fault, place % 3)

    @rule(worker=TWO)
    def start_again(self, worker: int) -> None:
        self.workers[worker] = WorkerSteps(self.connected())

    @rule(gateway=TWO, fault=FAULTS)
    def make_a_key(self, gateway: int, fault: Fault | None) -> None:
        parts, key = self.gateways[gateway], access_key(new_secret(), "somebody", "tests", [Scope.ADMIN])
        outcome = self.tried(parts, parts.keys.add(key), fault)
        if outcome is True or self.raw.hexists(keys.ACCESS_KEYS, key.digest):
            self.revoked[key.digest] = False
        self.check_keys()

    @rule(which=st.integers(0, 9), gateway=TWO, fault=FAULTS)
    def revoke_a_key(self, which: int, gateway: int, fault: Fault | None) -> None:
        if not self.revoked:
            return
        parts, digest = self.gateways[gateway], list(self.revoked)[which % len(self.revoked)]
        outcome = self.tried(parts, parts.keys.revoke(digest, 1), fault)
        assert fault or not isinstance(outcome, ApiError)
        if fault is not Fault.LOST_REQUEST:
            self.revoked[digest] = True
        self.check_keys()

    @rule(full=st.sampled_from([True, False, False]))
    def set_full(self, *, full: bool) -> None:
        self.full = full
        for each in server.servers:
            ask(each, "CONFIG SET", "maxmemory", ask(each, "INFO", "memory")["used_memory"] // 2 if full else 0)

    @precondition(lambda self: not self.failed_over)
    @rule(lost=BOOL)
    def fail_over(self, *, lost: bool) -> None:
        """The primary hands over, or has died a moment after it answered; what is known to be so still is."""
        self.failed_over = True
        self.marks_lost += 1
        server.fail_over(lost=lost)
        if FAKE_TIME:
            server.set_clock(self.ahead_s)
        self.set_full(full=self.full)  # a server that was started anew has forgotten it
        for user, expected in self.users.items():
            assert self.text_of(user) == expected.text
            assert self.newest(user) == expected.newest
            self.observe(user)
        self.check_keys()

    @precondition(lambda self: not self.failed_over)
    @rule(user=USERS, gateway=TWO)
    def write_while_cut_off_and_fail_over(self, user: str, gateway: int) -> None:
        """The replica no longer gets what the primary writes, and takes over: so none of it may be acknowledged."""
        parts, key = self.gateways[gateway], KEYS.key(user)
        epoch, snapshot = self.begun(user, gateway) or "", self.run(parts.profiles.read(key))
        ask(server.replica, "REPLICAOF", "NO", "ONE")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(REPLICA_TIMEOUT_MS, 50)
            change = put_of(user, self.new_text(), snapshot)
            work = parts.profiles.commit(key, snapshot.version, change, epoch)
            written, erased = self.tried(parts, work), self.tried(parts, parts.erase(user))
        self.fail_over(lost=True)
        without_mark = not epoch and not snapshot.version  # as of a full store: refused, known to the replica or not
        assert isinstance(written, Unavailable | UserErased if without_mark else Unavailable)
        assert isinstance(erased, Unavailable)

    @precondition(lambda self: FAKE_TIME is not None)
    @rule(by_s=JUMPS_S)
    def jump(self, by_s: float) -> None:
        self.marks_lost += 1
        self.ahead_s = min(MOST_AHEAD_S, max(-MOST_AHEAD_S, self.ahead_s + by_s))
        server.set_clock(self.ahead_s)

    def teardown(self) -> None:
        self.set_full(full=False)
        self.settle()
        self.check_keys()
        for user, expected in self.users.items():
            key = KEYS.key(user)
            self.observe(user)
            assert self.text_of(user) == expected.text
            states = self.states(user)
            assert all(state.ended for state in states.values())  # acknowledged or not: none waits for ever
            assert {number for number in expected.acknowledged if number > expected.newest - KEPT_JOBS} <= states.keys()
            if expected.text is None and not states:
                assert [name for name in self.everything() if key in name] in ([], [f"mta:{{{key}}}:epoch"])
        for parts in (*self.gateways, *(worker.parts for worker in self.workers)):
            self.run(parts.connection.close())
        self.loop.close()

    def settle(self) -> None:
        """Let a worker do whatever is to be done, until nothing is."""
        worker = WorkerSteps(self.connected())
        for _ in range(40):
            self.let_leases_expire()
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
        self.run(worker.parts.connection.close())

    def let_leases_expire(self) -> None:  # and reservations; postponed users become due
        if FAKE_TIME:
            self.ahead_s += 100
            server.set_clock(self.ahead_s)
            return
        for name in self.raw.keys("mta:*:job:*"):
            if self.raw.hexists(name, "lease"):
                self.raw.hset(name, "lease_until", 1)
        for name in QUEUES:
            for member in self.raw.zrange(name, 0, -1):
                self.raw.zadd(name, {member: 0})

    @property
    def raw(self) -> redis.Redis:
        return self._raw[server.servers.index(server.primary)]

    def connected(self) -> StoreParts:
        parts = StoreParts(server.url)
        self.run(parts.until_checked())
        return parts

    def run(self, work: Work[T]) -> T:
        return self.loop.run(work)

    def tried(self, parts: StoreParts, work: Work[T], fault: Fault | None = None, place: int = 0) -> T | ApiError:
        """Do something, one of its writes failing; what came of it."""
        Store.tries += 1
        parts.connection.fail(fault, place)
        try:
            return self.run(work)
        except ApiError as error:
            return error
        finally:
            parts.connection.fail(None)

    def begun(self, user: str, gateway: int) -> str | None:
        """The epoch of a write that begins now; None if the store is too full for one."""
        parts = self.gateways[gateway]
        epoch = self.tried(parts, parts.profiles.begin(KEYS.key(user)))
        assert self.full or isinstance(epoch, str)
        return epoch if isinstance(epoch, str) else None

    def new_text(self) -> str:
        self.texts += 1
        return f"text {self.texts}."

    def check_keys(self) -> None:
        """Every API key that was made is there, and revoked if it was."""
        ring = self.run(self.gateways[0].keys.all())
        assert {key.digest: key.revoked_ms is not None for key in ring.keys} == self.revoked

    def text_of(self, user: str) -> str | None:
        """What the store holds of a user; whole or not at all."""
        snapshot = self.run(self.gateways[0].profiles.read(KEYS.key(user)))
        assert (snapshot.profile is None) == (not snapshot.items)
        return snapshot.items["it"].fields["text"] if snapshot.items else None

    def newest(self, user: str) -> int:
        last = self.raw.hget(keys.jobs(KEYS.key(user)), "last")
        return int(last) if last else self.users[user].newest

    def states(self, user: str) -> dict[int, JobState]:
        names = self.raw.keys(f"{keys.job_prefix(KEYS.key(user))}*")
        return {int(name.rsplit(b":", 1)[1]): JobState(self.raw.hget(name, "state").decode()) for name in names}

    def end_as(self, user: str, numbers: set[int], state: JobState) -> None:
        """Somebody was told that these jobs ended, or they had to: for the first time."""
        for number in numbers:
            assert self.ended.setdefault(JobId(KEYS.key(user), number), state) is state
            assert self.states(user).get(number, state) is state

    def observe(self, user: str) -> None:
        held = {name.decode(): value for name, value in self.raw.hgetall(keys.adapter(KEYS.key(user))).items()}
        found = self.run(self.gateways[0].adapters.kept(KEYS.key(user)))
        raws = [held["raw" if one is found.serving else f"raw:{one.number}"] for one in found.versions]
        assert [hashlib.sha256(raw).hexdigest() for raw in raws] == [one.sha256 for one in found.versions]
        assert (found.serving is not None, len(raws) <= 3) == (bool(held), True)
        for number, state in self.states(user).items():
            if state.ended:
                assert self.ended.setdefault(JobId(KEYS.key(user), number), state) is state

    def kept_of(self, user: str) -> list[bytes]:
        return [name for name in self.raw.keys(f"*{KEYS.key(user)}*") if not name.endswith(b":epoch")]

    def everything(self) -> list[str]:
        """Names of keys, and names within what all users share."""
        names = [name.decode() for name in self.raw.scan_iter()]
        within = {b"zset": lambda name: self.raw.zrange(name, 0, -1), b"set": self.raw.smembers}
        within[b"hash"] = self.raw.hkeys
        for name in names.copy():
            if "{" not in name or name.startswith(("mta:{jobs", "mta:{sign")):
                names += [f"{name}/{member.decode()}" for member in within[self.raw.type(name)](name)]
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
    print(f"{Store.tries} steps")
    assert Store.tries >= steps
