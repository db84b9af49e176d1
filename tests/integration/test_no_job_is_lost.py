"""Whatever is killed, every accepted job ends once, and what it promoted is whole: real processes, really killed.

Clients send no idempotency keys, and try again until they are answered; between gateway and store answers get lost.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from adapters.recipe import UserAdapterId, parse_recipe
from adapters.user_adapter import decode_user_adapter
from bank.manifest import read_manifest
from bench.rig.processes import Background, mta, wait_until
from bench.rig.proxy import LossyProxy
from bench.rig.valkey import ValkeyProcess
from server.store.jobs import Job, JobId, parse_job_id
from server.store.redis.adapters import RedisAdapters
from server.store.redis.jobs import RedisJobs
from server.store.redis.profiles import RedisProfiles
from server.store.redis.servers.connection import RedisConnection
from server.supervisor.services import free_port

USERS = 200
KILLS = 9
SETTLE_S = 240.0
SECRET = "s" * 32
SAMPLES = [{"input": f"question {n}", "output": f"{n} yes yes yes"} for n in range(3)]
BODY = {"samples": SAMPLES, "config": {"steps": 2, "learning_rate": 0.02}}
LOST_SHARE = 0.05


@dataclass
class Machine:
    """A gateway, two workers and a Valkey, each of which can be killed and started again."""

    environment: dict[str, str]
    lossy: LossyProxy
    valkey: ValkeyProcess
    port: int
    running: dict[str, Background] = field(default_factory=dict)

    def start(self, name: str) -> None:
        if name == "valkey":
            self.valkey.start()
            return
        if name == "gateway":
            url = f"redis://127.0.0.1:{self.lossy.port}/0"
            command = mta("gateway", "--port", str(self.port), "--redis-url", url)
        else:
            command = mta("worker", "--threads", "1")
        self.running[name] = Background(command, self.environment)

    def kill(self, name: str) -> None:
        if name == "valkey":
            self.valkey.kill()
        else:
            self.running[name].process.kill()
            self.running[name].process.wait()

    def mend(self) -> None:
        """Start again what has ended: a part that finds the store down at its start gives up."""
        for name, background in list(self.running.items()):
            if background.process.poll() is not None:
                self.start(name)


@pytest.fixture
def machine(
    tmp_path: Path, tiny_bank_folder: Path, tiny_model_folder: Path, embedder_folder: Path
) -> Iterator[Machine]:
    valkey = ValkeyProcess(tmp_path / "valkey").start()
    environment = {
        "MTA_BANK": str(tiny_bank_folder),
        "MTA_MODEL": str(tiny_model_folder),
        "MTA_EMBEDDER": str(embedder_folder),
        "MTA_SECRET": SECRET,
        "MTA_REDIS_URL": valkey.url,
        "MTA_ENGINE_URL": f"http://127.0.0.1:{free_port()}",  # nobody generates here
    }
    with LossyProxy(valkey.port) as lossy:
        here = Machine(environment, lossy, valkey, free_port())
        for name in ("gateway", "worker-1", "worker-2"):
            here.start(name)
        yield here
        for name in here.running:
            here.kill(name)
    valkey.kill()


def accepted(machine: Machine, user: int) -> str:
    """Post until it is accepted; the job's id."""
    while True:
        with suppress(httpx.TransportError):
            answer = httpx.post(f"http://127.0.0.1:{machine.port}/users/user-{user}/adapt", json=BODY, timeout=30)
            if answer.status_code == httpx.codes.ACCEPTED:
                return str(answer.json()["id"])
            assert answer.status_code == httpx.codes.SERVICE_UNAVAILABLE, answer.text
        time.sleep(0.5)


@pytest.mark.timeout(600)
def test_every_accepted_job_ends_once_and_leaves_at_most_one_whole_adapter(
    machine: Machine, tiny_bank_folder: Path
) -> None:
    chance = random.Random(7)
    with ThreadPoolExecutor(32) as pool:
        machine.lossy.share = LOST_SHARE
        posting = [pool.submit(accepted, machine, user) for user in range(USERS)]
        for _ in range(KILLS):
            time.sleep(chance.uniform(0.5, 5))
            name = chance.choice(["gateway", "worker-1", "worker-2", "valkey"])
            machine.kill(name)
            time.sleep(chance.uniform(0, 1))
            machine.start(name)
            machine.mend()
        ids = [job_id for job_id in (parse_job_id(future.result()) for future in posting) if job_id]
    assert len(set(ids)) == USERS
    assert machine.lossy.lost > 0
    machine.lossy.share = 0.0

    def settled() -> bool:
        machine.mend()
        return all(job is not None and job.state.ended for job in asyncio.run(_jobs(machine, ids)))

    wait_until(settled, "every job to end", SETTLE_S)
    states = Counter(job.state.value for job in asyncio.run(_jobs(machine, ids)) if job)
    assert set(states) <= {"succeeded", "rejected", "failed"}
    # What had ended without an adapter before its client tried again.
    assert all(job.state in ("rejected", "failed") for job in asyncio.run(_earlier(machine, ids)))
    assert states["succeeded"] > USERS / 2, states
    asyncio.run(_check_adapters(machine, ids, tiny_bank_folder))


async def _jobs(machine: Machine, ids: list[JobId]) -> list[Job | None]:
    connection = RedisConnection(machine.valkey.url)
    jobs = RedisJobs(connection)
    try:
        return [await jobs.job(job_id) for job_id in ids]
    finally:
        await connection.close()


async def _earlier(machine: Machine, ids: list[JobId]) -> list[Job]:
    """The jobs that the same users had before."""
    connection = RedisConnection(machine.valkey.url)
    jobs = RedisJobs(connection)
    try:
        return [job for job_id in ids for job in await jobs.jobs(job_id.user_key) if job.id != job_id]
    finally:
        await connection.close()


async def _check_adapters(machine: Machine, ids: list[JobId], bank: Path) -> None:
    """An adapter is there exactly where its job succeeded; its record names it, and its bytes are whole and load."""
    connection, layout = RedisConnection(machine.valkey.url), read_manifest(bank).layout
    jobs, profiles, adapters = RedisJobs(connection), RedisProfiles(connection), RedisAdapters(connection)
    for job_id in ids:
        job, profile = await jobs.job(job_id), await profiles.load(job_id.user_key)
        assert job is not None
        assert profile is not None
        kept = await adapters.adapter_id(job_id.user_key)
        assert (kept or "") == job.adapter == (profile.adapter.id if profile.adapter else "")
        assert bool(kept) == (job.state == "succeeded")
        if kept:
            stored = await adapters.adapter(UserAdapterId(job_id.user_key, kept))
            assert stored is not None
            assert hashlib.sha256(stored.raw).hexdigest() == stored.sha256
            adapter = decode_user_adapter(layout, stored.raw)
            assert parse_recipe(adapter.recipe).name == stored.recipe
    await connection.close()
