"""The store's promises as a model: whatever dies, is lost or comes late, in whatever order, against a real Valkey.

No acknowledged write is lost, also when a replica takes over. Nothing of an erased user is left but their tombstone,
and nothing that was under way brings them back. Every acknowledged job ends, and ends once. What a full store refuses
changes nothing; users are erased and API keys revoked there as elsewhere. `--hypothesis-profile=long` takes 25 times as
many steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from bench.rig.cluster import ask
from bench.rig.valkey import FAKE_TIME
from bench.rig.watched import WatchedValkey
from server.errors import ApiError, Unavailable, UserErased
from server.store.jobs import KEPT_JOBS, JobId, JobState, Submission
from server.store.profiles import UNKNOWN_TOMBSTONE_S
from server.store.redis import keys
from server.store.redis.servers import base
from server.store.tenants.access_keys import Scope, access_key, new_secret
from tests.support.store_parts import BANK, KEYS, Fault, WorkerSteps, put_of
from tests.support.store_world import Expected, StoreWorld, UnderWay

USERS = st.sampled_from(["ada", "bob"])
TWO, BOOL = st.integers(0, 1), st.booleans()
FAULTS = st.one_of(st.none(), st.none(), st.sampled_from(Fault))
PLACES = st.integers(0, 4)
JUMPS_S = st.sampled_from([1.0, 11.0, 16.0, 61.0, 3600.0, -5.0, -3600.0])
MOST_AHEAD_S = 3 * 24 * 3600  # below a tombstone's life: whatever is under way ends long before that
STEPS = {"default": 2_000, "long": 50_000}
STEPS_A_RUN = 50

CUT_OFF_MS = 50
"""How long a write waits for a replica that is cut off from its primary."""

server: WatchedValkey


@pytest.fixture(scope="module", autouse=True)
def one_server() -> Iterator[None]:
    """In memory: what a disk would add to this test is time."""
    global server  # noqa: PLW0603  hypothesis makes the machine without arguments
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    server = WatchedValkey(folder, clock=FAKE_TIME is not None).start()
    yield
    server.kill()


class Store(RuleBasedStateMachine):
    """Two gateways, two workers, two users, one store of a primary and a replica.

    In each run the replica takes over once, for that takes a second.
    """

    @initialize()
    def begin(self) -> None:
        self.world = StoreWorld(server)
        self.under_way: list[UnderWay] = []
        self.texts = 0
        self.jumped_s = 0.0
        self.failed_over = False

    @rule(user=USERS, gateway=TWO)
    def begin_a_put(self, user: str, gateway: int) -> None:
        self.texts += 1
        snapshot = self.world.run(self.world.gateways[gateway].profiles.read(KEYS.key(user)))
        erasures = self.world.users[user].erasures
        self.under_way.append(UnderWay(user, f"text {self.texts}", snapshot, erasures, self.jumped_s))

    @precondition(lambda self: self.under_way)
    @rule(which=st.integers(0, 9), gateway=TWO, fault=FAULTS)
    def finish_a_put(self, which: int, gateway: int, fault: Fault | None) -> None:
        put = self.under_way.pop(which % len(self.under_way))
        parts, expected = self.world.gateways[gateway], self.world.users[put.user]
        if expected.was_nobody and self.jumped_s - put.jumped_s > UNKNOWN_TOMBSTONE_S - 60:
            return  # no request takes so long
        change = put_of(put.user, put.text, put.snapshot)
        work = parts.profiles.commit(KEYS.key(put.user), put.snapshot.version, change, put.snapshot.epoch)
        outcome = self.world.tried(parts, work, fault)
        found = self.world.text_of(put.user)
        if expected.erasures > put.erasures:
            assert isinstance(outcome, UserErased | Unavailable)
            assert found == expected.text
        elif outcome is True:
            assert found == put.text
        elif outcome is False or self.world.full:
            assert found == expected.text
        else:
            assert found in (expected.text, put.text)
        assert not (self.world.full and outcome is True)
        expected.text = found
        if outcome is True:
            self.world.tried(parts, parts.signing.add(KEYS.key(put.user)))

    @rule(user=USERS, gateway=TWO, sample=TWO, append=BOOL, background=BOOL, fault=FAULTS, place=PLACES)
    def adapt(
        self, *, user: str, gateway: int, sample: int, append: bool, background: bool, fault: Fault | None, place: int
    ) -> None:
        parts, expected, key = self.world.gateways[gateway], self.world.users[user], KEYS.key(user)
        before = self.world.states(user)
        epoch = self.world.run(parts.profiles.epoch(key))
        submission = Submission([b"sample %d" % sample], append, "{}", BANK, epoch, background=background)
        outcome = self.world.tried(parts, parts.jobs.submit(key, submission, 100), fault, place % 3)
        newest = self.world.newest(user)
        assert newest in (expected.newest, expected.newest + 1) or (expected.newest == 0 and not before)
        assert newest not in expected.former
        assert not (self.world.full and newest > expected.newest)
        if not isinstance(outcome, ApiError):
            assert outcome.id == JobId(key, newest)
            expected.acknowledged.add(newest)
        if newest == expected.newest:
            assert self.world.states(user) == before
        else:
            self.world.end_as(user, {n for n, state in before.items() if not state.ended}, JobState.SUPERSEDED)
        expected.newest = newest

    @rule(user=USERS, gateway=TWO, fault=FAULTS, place=PLACES)
    def adapt_while_erased(self, user: str, gateway: int, fault: Fault | None, place: int) -> None:
        parts, key = self.world.gateways[gateway], KEYS.key(user)
        epoch = self.world.run(parts.profiles.epoch(key))
        self.erase(user, 1 - gateway, None, 0)
        submission = Submission([b"sample"], False, "{}", BANK, epoch)
        outcome = self.world.tried(parts, parts.jobs.submit(key, submission, 100), fault, place % 3)
        assert isinstance(outcome, UserErased | Unavailable)
        assert self.world.run(parts.jobs.samples(key)) == []

    @rule(user=USERS, gateway=TWO, fault=FAULTS, place=PLACES)
    def erase(self, user: str, gateway: int, fault: Fault | None, place: int) -> None:
        parts, expected, key = self.world.gateways[gateway], self.world.users[user], KEYS.key(user)
        before, former = self.world.run(parts.profiles.epoch(key)), expected.former | self.world.states(user).keys()
        was_nobody = not [name for name in self.world.raw.keys(f"*{{{key}}}*") if not name.endswith(b":epoch")]
        outcome = self.world.tried(parts, parts.erase(user), fault, place)
        assert fault or not isinstance(outcome, ApiError)
        if self.world.run(parts.profiles.epoch(key)) == before:
            assert isinstance(outcome, ApiError)
            return
        self.world.ended = {job: state for job, state in self.world.ended.items() if job.user_key != key}
        self.world.users[user] = Expected(None, expected.erasures + 1, was_nobody, former=former)
        assert [name for name in self.world.raw.keys(f"*{key}*") if not name.endswith(b":epoch")] == []
        if not isinstance(outcome, ApiError):
            again = self.world.tried(parts, parts.erase(user))
            assert again == outcome

    @rule(user=USERS, gateway=TWO, fault=FAULTS)
    def cancel(self, user: str, gateway: int, fault: Fault | None) -> None:
        parts, key = self.world.gateways[gateway], KEYS.key(user)
        job_id = JobId(key, max(1, self.world.users[user].newest))
        outcome = self.world.tried(parts, parts.jobs.cancel(job_id), fault)
        if not isinstance(outcome, ApiError) and outcome[1]:
            self.world.end_as(user, {job_id.number}, JobState.CANCELLED)
        self.world.observe(user)

    @rule(worker=TWO, fault=FAULTS, place=PLACES)
    def take_and_claim(self, worker: int, fault: Fault | None, place: int) -> None:
        steps = self.world.workers[worker]
        if steps.lease is None:
            self.world.tried(steps.parts, steps.take())
            self.world.tried(steps.parts, steps.claim(), fault, place % 2)

    @precondition(lambda self: any(worker.lease for worker in self.world.workers))
    @rule(worker=TWO, promote=st.booleans(), fault=FAULTS, place=PLACES)
    def finish_a_job(self, worker: int, promote: bool, fault: Fault | None, place: int) -> None:
        steps = self.world.workers[worker]
        if steps.lease is None:
            return
        job_id = steps.lease.job.id
        user = next(user for user in self.world.users if KEYS.key(user) == job_id.user_key)
        outcome = self.world.tried(steps.parts, steps.promote() if promote else steps.reject(), fault, place % 2)
        steps.lease = None
        if outcome and not isinstance(outcome, ApiError):
            self.world.end_as(user, {job_id.number}, JobState.SUCCEEDED if promote else JobState.REJECTED)
        self.world.observe(user)

    @precondition(lambda self: any(worker.lease for worker in self.world.workers))
    @rule(worker=TWO, counts=st.booleans(), gives_back=st.booleans(), fault=FAULTS, place=PLACES)
    def go_on_or_give_back(self, worker: int, counts: bool, gives_back: bool, fault: Fault | None, place: int) -> None:
        steps = self.world.workers[worker]
        if steps.lease is None:
            return
        jobs, lease = steps.parts.jobs, steps.lease
        if gives_back:
            self.world.tried(steps.parts, jobs.release(lease, counts=counts), fault, place % 2)
            steps.lease = None
        else:
            self.world.tried(steps.parts, jobs.renew(lease, 15.0, step=1, of=2, loss=None), fault)

    @precondition(lambda self: FAKE_TIME is not None and any(worker.lease for worker in self.world.workers))
    @rule(worker=TWO, fault=FAULTS)
    def take_over(self, worker: int, fault: Fault | None) -> None:
        """A worker falls silent for longer than its lease, and lives on; the other takes the job up."""
        other = self.world.workers[1 - worker]
        if self.world.workers[worker].lease is not None and other.lease is None:
            self.jump(61.0)
            self.take_and_claim(1 - worker, fault, 0)

    @rule(worker=TWO, fault=FAULTS, place=PLACES)
    def sign(self, worker: int, fault: Fault | None, place: int) -> None:
        steps = self.world.workers[worker]
        if steps.signing is None:
            self.world.tried(steps.parts, steps.take_signing())
        if steps.signing is not None:
            self.world.tried(steps.parts, steps.sign(), fault, place % 3)

    @rule(worker=TWO)
    def die(self, worker: int) -> None:
        """And start again."""
        self.world.workers[worker] = WorkerSteps(self.world.connected())

    @rule(gateway=TWO, fault=FAULTS)
    def make_a_key(self, gateway: int, fault: Fault | None) -> None:
        parts, key = self.world.gateways[gateway], access_key(new_secret(), "somebody", "tests", [Scope.ADMIN])
        outcome = self.world.tried(parts, parts.keys.add(key), fault)
        if outcome is True or self.world.raw.hexists(keys.ACCESS_KEYS, key.digest):
            self.world.revoked[key.digest] = False
        self.world.check_keys()

    @precondition(lambda self: self.world.revoked)
    @rule(which=st.integers(0, 9), gateway=TWO, fault=FAULTS)
    def revoke_a_key(self, which: int, gateway: int, fault: Fault | None) -> None:
        parts, digest = self.world.gateways[gateway], list(self.world.revoked)[which % len(self.world.revoked)]
        outcome = self.world.tried(parts, parts.keys.revoke(digest, 1), fault)
        assert fault or not isinstance(outcome, ApiError)
        if fault is not Fault.LOST_REQUEST:
            self.world.revoked[digest] = True
        self.world.check_keys()

    @rule(full=st.sampled_from([True, False, False]))
    def fill(self, *, full: bool) -> None:
        self.world.fill(full=full)

    @precondition(lambda self: not self.failed_over)
    @rule(lost=st.booleans())
    def fail_over(self, *, lost: bool) -> None:
        """The replica takes over: from a primary that hands over, or that has died a moment after it answered."""
        self.failed_over = True
        self.world.fail_over(lost=lost)

    @precondition(lambda self: not self.failed_over)
    @rule(user=USERS, gateway=TWO)
    def write_while_cut_off_and_fail_over(self, user: str, gateway: int) -> None:
        """The replica no longer gets what the primary writes, and takes over: so none of it may be acknowledged."""
        self.failed_over = True
        parts, key = self.world.gateways[gateway], KEYS.key(user)
        self.texts += 1
        snapshot = self.world.run(parts.profiles.read(key))
        ask(server.replica, "REPLICAOF", "NO", "ONE")
        patience_ms, base.REPLICA_TIMEOUT_MS = base.REPLICA_TIMEOUT_MS, CUT_OFF_MS
        try:
            change = put_of(user, f"text {self.texts}", snapshot)
            work = parts.profiles.commit(key, snapshot.version, change, snapshot.epoch)
            assert isinstance(self.world.tried(parts, work), Unavailable)
            assert isinstance(self.world.tried(parts, parts.erase(user)), Unavailable)
        finally:
            base.REPLICA_TIMEOUT_MS = patience_ms
        self.world.fail_over(lost=True)

    @precondition(lambda self: FAKE_TIME is not None)
    @rule(by_s=JUMPS_S)
    def jump(self, by_s: float) -> None:
        self.jumped_s += max(0.0, by_s)
        self.world.ahead_s = min(MOST_AHEAD_S, max(-MOST_AHEAD_S, self.world.ahead_s + by_s))
        server.set_clock(self.world.ahead_s)

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        self.world.fill(full=False)
        self.world.settle()
        self.world.check_keys()
        for user, expected in self.world.users.items():
            key = KEYS.key(user)
            self.world.observe(user)
            assert self.world.text_of(user) == expected.text
            states = self.world.states(user)
            assert all(state.ended for state in states.values())  # acknowledged or not: none waits for ever
            assert {number for number in expected.acknowledged if number > expected.newest - KEPT_JOBS} <= states.keys()
            if expected.text is None and not states:
                assert [name for name in self.world.everything() if key in name] in ([], [f"mta:{{{key}}}:epoch"])
        self.world.loop.run(self.world.close())
        self.world.loop.close()


@pytest.mark.timeout(3600)
def test_the_store_keeps_its_promises_whatever_happens(request: pytest.FixtureRequest) -> None:
    profile = "long" if request.config.getoption("--hypothesis-profile") == "long" else "default"
    steps = STEPS[profile]
    run_state_machine_as_test(
        Store,
        settings=settings(
            max_examples=steps // STEPS_A_RUN * 3 // 2,
            stateful_step_count=STEPS_A_RUN,
            deadline=None,
            derandomize=profile == "default",
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{StoreWorld.steps} steps")
    assert StoreWorld.steps >= steps
