"""Worker processes that are stopped, run out of memory or hang: no accepted job is lost."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from httpx import Client

from bench.rig.processes import Background, mta, wait_until
from bench.rig.valkey import ValkeyProcess
from tests.support.calls import NewUser, adapt, job_of

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


def test_out_of_memory_fails_the_job_and_the_worker_goes_on(
    client: Client, post: Post, ada: str, new_user: NewUser, worker: Running
) -> None:
    with worker() as background:
        small = post(new_user(), SHORT, steps=1)
        wait_until(lambda: small()["ended_at"], "a small job, after which everything is loaded")
        _leave_little_memory(background.process.pid)
        job = post(ada, LARGE, steps=4)
        ended = background.process.poll
        wait_until(lambda: job()["ended_at"] or ended() is not None, "the job to end")
        if ended() is None:
            assert "training ran out of memory" in job()["error"]
            small = post(new_user(), SHORT, steps=1)
            wait_until(lambda: small()["ended_at"], "a small job, for which there is memory")
            assert small()["state"] != "failed"
        else:  # a matrix library ends the process without a word, the event loop after it has returned the job
            assert job()["state"] in ("running", "queued")
            assert job()["tries"] == 1
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
