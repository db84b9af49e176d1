"""Whichever process is killed, every accepted job ends once, and the adapter that it promoted is complete.

Clients send no idempotency keys and retry until they get an answer; answers between gateway and store get lost.
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
from server.supervisor.services import free_port
from tests.support.calls import SAMPLES
from tests.support.store_parts import StoreParts

USERS = 120
KILLS = 9
SETTLE_S = 240.0
SECRET = "s" * 32
BODY = {"samples": SAMPLES[:3], "config": {"steps": 2, "learning_rate": 0.02}}
LOST_SHARE = 0.05


@dataclass
class Machine:
    """A gateway, two workers and a Valkey, each of which can be killed and restarted."""

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
