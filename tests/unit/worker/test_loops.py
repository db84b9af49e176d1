"""What a worker counts and where it serves it, and the order of a signature's steps."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from adapters.errors import MtaError
from server.settings import Settings
from server.store.jobs import Job, JobId, JobState
from server.supervisor.services import free_port
from server.worker.loops import SigningLoop, WorkerMetrics


def shown(port: int) -> dict[str, float]:
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status().text.splitlines()
    parts = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in parts}


def test_a_jobs_wait_is_counted_at_its_first_try_and_its_time_at_each() -> None:
    figures, port = WorkerMetrics(), free_port()
    figures.publish(Settings(metrics_port=port))
    assert shown(port)['mta_worker_jobs_total{outcome="failed"}'] == 0
    for tries in (1, 2):
        job = Job(JobId("user", 1), JobState.RUNNING, "{}", 1_000, "9f2c41d0", started_ms=4_000, tries=tries)
        with figures.training(job):
            assert shown(port)["mta_worker_job_running_seconds"] > 0
    found = shown(port)
    assert (found["mta_worker_job_wait_seconds_count"], found["mta_worker_job_wait_seconds_sum"]) == (1, 3)
    assert (found["mta_worker_job_seconds_count"], found["mta_worker_job_running_seconds"]) == (2, 0)


def test_a_port_in_use_is_named_and_by_default_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MtaError, match=f"127.0.0.1:{port}.*MTA_METRICS_PORT"):
            WorkerMetrics().publish(Settings(metrics_port=port))
    monkeypatch.setattr("server.worker.loops.start_http_server", lambda *_, **__: pytest.fail("it listens"))
    WorkerMetrics().publish(Settings())


async def test_a_try_counts_once_the_model_is_free_and_a_changed_user_is_signed_again() -> None:
    """While a worker waits for the model, others take its user again, which must not count."""
    lock, steps = asyncio.Lock(), list[str]()

    def step(name: str, answer: object = None) -> Any:
        async def called(*_: object) -> object:
            steps.append(f"{name}, {'busy' if lock.locked() else 'free'}")
            return answer

        return called

    changed = SimpleNamespace(is_signed=lambda bank: False)
    queue: Any = SimpleNamespace(
        take=step("take", "key"), count_attempt=step("count_attempt", 1), remove=step("remove"), add=step("add")
    )
    profiles: Any = SimpleNamespace(read=step("read", SimpleNamespace(profile=None)), load=step("load", changed))
    bank: Any = SimpleNamespace(manifest=SimpleNamespace(short="9f2c41d0"))
    assert await SigningLoop(queue, profiles, bank, None, lock).work_once(0)
    assert steps == ["take, free", "count_attempt, busy", "read, busy", "remove, free", "load, free", "add, free"]
