"""Worker processes that are stopped, run out of memory, hang or are killed: no accepted job is lost."""

from __future__ import annotations

import asyncio
import hashlib
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from httpx import Client

from adapters.recipe import UserAdapterId, parse_recipe
from adapters.user_adapter import decode_user_adapter
from bank.manifest import read_manifest
from bench.rig.processes import Background, mta, wait_until
from bench.rig.proxy import LossyProxy
from bench.rig.valkey import ValkeyProcess
from server.store.jobs import Job, JobId, parse_job_id
from server.supervisor.services import free_port
from tests.support.calls import SAMPLES, NewUser, adapt, job_of
from tests.support.store_parts import StoreParts

HANGS = """
import time
import server.worker.lease as stall
import server.worker.training as training
from server.cli.run.processes import worker

stall.STALL_S = 1.0
training.train_user = lambda *_, **__: time.sleep(3600)
worker()
"""
LONG = [{"input": f"question {n}", "output": "yes " * 115} for n in range(16)]
LARGE = [{"input": f"question {n}", "output": "yes " * 115} for n in range(256)]  # what is computed once is kept
SHORT = [{"input": "question", "output": "yes"}] * 2
SPARE_BYTES = 1 << 24
USERS = 120
KILLS = 9
SETTLE_S = 240.0
BODY = {"samples": SAMPLES[:3], "config": {"steps": 2, "learning_rate": 0.02}}
LOST_SHARE = 0.05


Running = Callable[..., AbstractContextManager[Background]]
Post = Callable[..., Callable[[], dict[str, Any]]]


@pytest.fixture(scope="module")
def environment(tiny_bank_folder: Path, tiny_model_folder: Path, embedder_folder: Path) -> dict[str, str]:
    folders = {"MTA_BANK": tiny_bank_folder, "MTA_MODEL": tiny_model_folder, "MTA_EMBEDDER": embedder_folder}
    return {name: str(folder) for name, folder in folders.items()}


@pytest.fixture
def worker(environment: dict[str, str], valkey: ValkeyProcess) -> Running:
    """Runs a worker for the duration of a `with` block."""

    @contextmanager
    def running(command: Sequence[str] = mta("worker", "--threads", "1")) -> Iterator[Background]:
        background = Background(command, environment | {"MTA_REDIS_URL": valkey.url})
        try:
            background.wait_for("ready: bank")
            yield background
        finally:
            background.process.kill()
            background.wait()

    return running


@pytest.fixture
def post(client: Client) -> Iterator[Post]:
    """Submits a job and returns a function that reads it; jobs that have not ended are cancelled afterwards."""
    posted: list[dict[str, Any]] = []

    def submit(user: str, samples: list[dict[str, str]], **config: Any) -> Callable[[], dict[str, Any]]:
        job = adapt(client, user, samples=samples, config=config).raise_for_status().json()
        posted.append(job)
        return partial(job_of, client, job)

    yield submit
    for job in posted:
        client.delete(f"/jobs/{job['id']}")


def test_a_worker_that_is_stopped_returns_its_job_at_once(post: Post, ada: str, worker: Running) -> None:
    job = post(ada, LONG, steps=150)
    with worker() as first:
        wait_until(lambda: job()["progress"]["step"] > 0, "the first steps")
        first.send(signal.SIGTERM)
        assert first.wait() == 0
        assert "returned to the queue" in first.output
        assert "leaked" not in first.output
    assert (job()["state"], job()["tries"]) == ("queued", 0)


def test_running_out_of_memory_ends_the_worker_and_is_a_try(
    client: Client, post: Post, ada: str, new_user: NewUser, worker: Running
) -> None:
    with worker() as background:
        small = post(new_user(), SHORT, steps=1)
        wait_until(lambda: small()["ended_at"], "a small job, after which everything is loaded")
        _leave_little_memory(background.process.pid)
        job = post(ada, LARGE, steps=4)
        assert background.wait() != 0
        returned = "returned to the queue" in background.output
    # A matrix library that gets no memory ends the process without a word: then the job waits for its lease to expire.
    assert (job()["state"], job()["tries"]) == ("queued" if returned else "running", 1)
    assert client.get("/ready").status_code == 200


def test_a_worker_whose_training_hangs_returns_the_job_and_ends(post: Post, ada: str, worker: Running) -> None:
    job = post(ada, SHORT, steps=1)
    with worker([sys.executable, "-c", HANGS]) as background:
        assert background.wait() == 1
        assert f"{job()['id']}: no step within 1 s" in background.output
    assert (job()["state"], job()["tries"]) == ("queued", 1)


def _leave_little_memory(pid: int) -> None:
    """Limit a process to little more memory than it has now."""
    sizes = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines())
    limit = int(sizes["VmData"].split()[0]) * 1024 + SPARE_BYTES
    resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))


@dataclass
class Machine:
    """A gateway, two workers and a Valkey to be killed; answers of the store get lost, and clients just retry."""

    environment: dict[str, str]
    lossy: LossyProxy
    valkey: ValkeyProcess
    port: int
    running: dict[str, Background] = field(default_factory=dict)

    def start(self, name: str) -> None:
        if name == "valkey":
            self.valkey.start()
            return
        url = f"redis://127.0.0.1:{self.lossy.port}/0"
        gateway = mta("gateway", "--port", str(self.port), "--redis-url", url)
        command = gateway if name == "gateway" else mta("worker", "--threads", "1")
        self.running[name] = Background(command, self.environment)

    def kill(self, name: str) -> None:
        if name == "valkey":
            self.valkey.kill()
        else:
            self.running[name].process.kill()
            self.running[name].process.wait()

    def mend(self) -> None:
        """Restart processes that have ended: one that finds the store down at its start gives up."""
        for name, background in list(self.running.items()):
            if background.process.poll() is not None:
                self.start(name)


@pytest.fixture
def machine(memory: Path, environment: dict[str, str]) -> Iterator[Machine]:
    valkey = ValkeyProcess(memory / "killed").start()
    nobody = f"http://127.0.0.1:{free_port()}"  # no engine is needed
    environment = environment | {"MTA_SECRET": "s" * 32, "MTA_REDIS_URL": valkey.url, "MTA_ENGINE_URL": nobody}
    with LossyProxy(valkey.port) as lossy:
        here = Machine(environment, lossy, valkey, free_port())
        for name in ("gateway", "worker-1", "worker-2"):
            here.start(name)
        yield here
        for name in here.running:
            here.kill(name)
    valkey.kill()


def accepted(machine: Machine, user: int) -> JobId:
    """Post a job until it is accepted; return its id."""
    while True:
        with suppress(httpx.TransportError):
            answer = httpx.post(f"http://127.0.0.1:{machine.port}/users/user-{user}/adapt", json=BODY, timeout=30)
            if answer.status_code == httpx.codes.ACCEPTED:
                job_id = parse_job_id(answer.json()["id"])
                assert job_id is not None
                return job_id
            assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE, answer.text
        time.sleep(0.5)


@pytest.mark.timeout(600)
def test_every_accepted_job_ends_once(machine: Machine, tiny_bank_folder: Path) -> None:
    chance = random.Random(7)
    with ThreadPoolExecutor(32) as pool:
        machine.lossy.share = LOST_SHARE
        posting = [pool.submit(accepted, machine, user) for user in range(USERS)]
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.3, 3))
            name = chance.choice(["gateway", "worker-1", "worker-2", "valkey"])
            machine.kill(name)
            time.sleep(chance.uniform(0, 1))
            machine.start(name)
            machine.mend()

        def posted() -> bool:
            machine.mend()
            return all(future.done() for future in posting)

        wait_until(posted, "every job to be accepted", SETTLE_S)
        ids = [future.result() for future in posting]
    assert len(set(ids)) == USERS
    assert machine.lossy.lost > 0
    machine.lossy.share = 0.0

    def settled() -> bool:
        machine.mend()
        return all(job is not None and job.state.ended for job in asyncio.run(_jobs(machine, ids)))

    wait_until(settled, "every job to end", SETTLE_S)
    asyncio.run(_check(machine, ids, tiny_bank_folder))


async def _jobs(machine: Machine, ids: list[JobId]) -> list[Job | None]:
    async with StoreParts.opened(machine.valkey.url) as parts:
        return [await parts.jobs.job(job_id) for job_id in ids]


async def _check(machine: Machine, ids: list[JobId], bank: Path) -> None:
    """Check how jobs ended, and that exactly the users whose job succeeded have its adapter, complete and loadable."""
    states, layout = Counter[str](), read_manifest(bank).layout
    async with StoreParts.opened(machine.valkey.url) as parts:
        for job_id in ids:
            *earlier, job = await parts.jobs.jobs(job_id.user_key)
            assert job.id == job_id
            assert all(one.state in ("rejected", "failed") for one in earlier)  # had ended before the client's retry
            states[job.state] += 1
            profile = await parts.profiles.load(job_id.user_key)
            kept = await parts.adapters.adapter_id(job_id.user_key)
            assert (kept or "") == job.adapter == (profile.adapter.id if profile.adapter else "")
            assert bool(kept) == (job.state == "succeeded")
            if kept:
                stored = await parts.adapters.adapter(UserAdapterId(job_id.user_key, kept))
                assert hashlib.sha256(stored.raw).hexdigest() == stored.sha256
                assert parse_recipe(decode_user_adapter(layout, stored.raw).recipe).name == stored.recipe
    assert set(states) <= {"succeeded", "rejected", "failed"}
    assert states["succeeded"] > USERS / 2, states
