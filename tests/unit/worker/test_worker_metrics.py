"""What a worker counts, and where it shows it."""

from __future__ import annotations

import socket

import httpx
import pytest

from adapters.errors import MtaError
from server.settings import Settings
from server.store.jobs import Job, JobId, JobState
from server.supervisor.services import free_port
from server.worker.metrics import WorkerMetrics


def job(tries: int) -> Job:
    return Job(JobId("user", 1), JobState.RUNNING, "{}", 1_000, "9f2c41d0", started_ms=4_000, tries=tries)


def shown(port: int) -> dict[str, float]:
    lines = httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status().text.splitlines()
    return {
        name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if not line.startswith("#"))
    }


def test_a_jobs_wait_is_counted_at_its_first_try_and_its_time_at_each() -> None:
    figures, port = WorkerMetrics(), free_port()
    figures.publish(Settings(metrics_port=port))
    assert shown(port)['mta_worker_jobs_total{outcome="failed"}'] == 0
    for tries in (1, 2):
        with figures.training(job(tries)):
            assert shown(port)["mta_worker_job_running_seconds"] > 0
    found = shown(port)
    assert (found["mta_worker_job_wait_seconds_count"], found["mta_worker_job_wait_seconds_sum"]) == (1, 3)
    assert found["mta_worker_job_seconds_count"] == 2
    assert found["mta_worker_job_running_seconds"] == 0


def test_a_port_that_is_taken_is_named_and_by_default_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(MtaError, match=f"127.0.0.1:{port}.*MTA_METRICS_PORT"):
            WorkerMetrics().publish(Settings(metrics_port=port))
    monkeypatch.setattr("server.worker.metrics.start_http_server", lambda *_, **__: pytest.fail("it listens"))
    WorkerMetrics().publish(Settings())
