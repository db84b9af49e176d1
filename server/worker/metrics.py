"""A worker's metrics, served on `MTA_METRICS_PORT` if it is set."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, start_http_server

from adapters.errors import MtaError
from server.settings import Settings
from server.store.jobs import Job, JobState
from server.watching.background import StoreSeconds

log = logging.getLogger("mta.worker")

_BUCKETS_S = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)

GIVEN_UP = "given up"  # returned to the queue
UNWANTED = "unwanted"  # cancelled, superseded, erased, or taken by another worker


class WorkerMetrics:
    """The metrics of one worker, in a separate registry. No label contains a user or a job."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        about = "Adapt jobs by how this worker left them."
        self.jobs = Counter("mta_worker_jobs", about, ("outcome",), registry=registry)
        for outcome in (JobState.SUCCEEDED, JobState.REJECTED, JobState.FAILED, UNWANTED, GIVEN_UP):
            self.jobs.labels(outcome)  # start at zero, so that the first job counts as an increase
        about = "From a job's request to its first try."
        self.wait = Histogram("mta_worker_job_wait_seconds", about, buckets=_BUCKETS_S, registry=registry)
        about = "From taking a job to its outcome."
        self.took = Histogram("mta_worker_job_seconds", about, buckets=_BUCKETS_S, registry=registry)
        self.signatures = Counter("mta_worker_signatures", "Users whose items were signed.", registry=registry)
        self.store = StoreSeconds(registry)
        self._begun_s: float | None = None
        running = Gauge("mta_worker_job_running_seconds", "How long the job in training takes.", registry=registry)
        running.set_function(lambda: 0.0 if self._begun_s is None else time.monotonic() - self._begun_s)
        ProcessCollector(registry=registry)

    def publish(self, settings: Settings) -> None:
        """Serve `/metrics` on a thread if the settings have a port. Raises MtaError if the port cannot be opened."""
        if not settings.metrics_port:
            return
        host, port = settings.inner_host, settings.metrics_port
        try:
            start_http_server(port, addr=host, registry=self._registry)
        except OSError as error:
            raise MtaError(
                f"cannot serve metrics on {host}:{port}: {error.strerror or error}. Choose another MTA_METRICS_PORT"
            ) from error
        log.info("metrics: http://%s:%d/metrics", host, port)

    @contextmanager
    def training(self, job: Job) -> Iterator[None]:
        """Measure waiting and training time of a job."""
        if job.tries == 1:
            self.wait.observe(max(0.0, job.started_ms - job.created_ms) / 1000)
        self._begun_s = time.monotonic()
        try:
            yield
        finally:
            self.took.observe(time.monotonic() - self._begun_s)
            self._begun_s = None
