"""A worker whose store may be away, or lose answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from bank.lookup.serving import ServingBank
from server.errors import Unavailable
from server.store.jobs import JobStore
from server.store.redis.servers.connection import RedisConnection
from server.worker.loops import JobLoop
from server.worker.training import AdapterTrainer
from tests.support.desk import Desk


def shaky(name: str) -> Any:
    """A store call that may fail, or whose answer may be lost."""
    whole = getattr(JobStore, name)

    async def call(jobs: Shaky, *args: Any, **kwargs: Any) -> Any:
        answer = None if jobs.away else await whole(jobs, *args, **kwargs)
        if jobs.away or name in jobs.lost:
            jobs.lost.discard(name)
            jobs.failures += 1
            if jobs.silent:
                await asyncio.Event().wait()
            raise Unavailable("the store cannot be used now")
        return answer

    return call


class Shaky(JobStore):
    """Real jobs, some of whose answers do not arrive."""

    def __init__(self, connection: RedisConnection) -> None:
        super().__init__(connection)
        self.away = False  # while true, nothing reaches the store
        self.lost = set[str]()  # calls whose next answer is lost after the store has done its work
        self.silent = False  # whether a lost answer is silence rather than an error
        self.failures = 0

    renew, claim, samples = shaky("renew"), shaky("claim"), shaky("samples")
    end, promote, release = shaky("end"), shaky("promote"), shaky("release")


@pytest.fixture
def worker(desk: Desk, trainer: AdapterTrainer, tiny_bank_folder: Path) -> JobLoop:
    bank = ServingBank.open(tiny_bank_folder, trainer.manifest.embedder.id)
    return JobLoop(Shaky(desk.connection), desk.profiles, desk.feedback, desk.adapters, bank=bank, trainer=trainer)
