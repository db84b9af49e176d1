"""`mta worker` as a process: what it does with its job when it is stopped, and when it finds no memory."""

from __future__ import annotations

import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench.rig.processes import Background, mta, wait_until
from bench.rig.valkey import ValkeyProcess

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


@pytest.fixture
def worker(
    tiny_bank_folder: Path, tiny_model_folder: Path, embedder_folder: Path, valkey: ValkeyProcess
) -> Callable[[], Any]:
    """Runs a worker for as long as a block lasts."""
    environment = {
        "MTA_BANK": str(tiny_bank_folder),
        "MTA_MODEL": str(tiny_model_folder),
        "MTA_EMBEDDER": str(embedder_folder),
        "MTA_REDIS_URL": valkey.url,
    }

    @contextmanager
    def running(command: Sequence[str] = mta("worker", "--threads", "1")) -> Iterator[Background]:
        background = Background(command, environment)
        try:
            background.wait_for("ready: bank")
            yield background
        finally:
            background.process.kill()
            background.wait()

    return running


def posted(
    client: httpx.Client, user: str, samples: list[dict[str, str]], **config: Any
) -> Callable[[], dict[str, Any]]:
    """Asks for a job; a look at it."""
    answer = client.post(f"/users/{user}/adapt", json={"samples": samples, "config": config}).raise_for_status()

    def job() -> dict[str, Any]:
        found: dict[str, Any] = client.get(f"/jobs/{answer.json()['id']}").raise_for_status().json()
        return found

    return job


def test_a_worker_that_is_stopped_gives_its_job_back_at_once(
    client: httpx.Client, ada: str, worker: Callable[[], Any]
) -> None:
    job = posted(client, ada, LONG, steps=150)
    with worker() as first:
        wait_until(lambda: job()["progress"]["step"] > 0, "the first steps")
        first.send(signal.SIGTERM)
        assert first.wait() == 0
        assert "returned to the queue" in first.output
        assert "leaked" not in first.output
    assert (job()["state"], job()["tries"]) == ("queued", 0)
    client.delete(f"/jobs/{job()['id']}").raise_for_status()


def test_a_job_that_finds_no_memory_ends_its_worker_and_is_a_try(
    client: httpx.Client, ada: str, new_user: Callable[[], str], worker: Callable[[], Any]
) -> None:
    with worker() as background:
        small = posted(client, new_user(), SHORT, steps=1)
        wait_until(lambda: small()["ended_at"], "a small job, after which everything is loaded")
        _leave_little_memory(background.process.pid)
        job = posted(client, ada, LARGE, steps=4)
        assert background.wait() != 0
        given_back = "returned to the queue" in background.output
    # A matrix library that gets no memory ends the process without a word: then the job waits for its lease to run out.
    assert (job()["state"], job()["tries"]) == ("queued" if given_back else "running", 1)
    assert client.get("/ready").status_code == httpx.codes.OK
    client.delete(f"/jobs/{job()['id']}").raise_for_status()


def test_a_worker_whose_training_hangs_gives_the_job_back_and_ends(
    client: httpx.Client, ada: str, worker: Callable[..., Any]
) -> None:
    job = posted(client, ada, SHORT, steps=1)
    with worker([sys.executable, "-c", HANGS]) as background:
        assert background.wait() == 1
        assert f"{job()['id']}: no step within 1 s" in background.output
    assert (job()["state"], job()["tries"]) == ("queued", 1)
    client.delete(f"/jobs/{job()['id']}").raise_for_status()


def _leave_little_memory(pid: int) -> None:
    """Leave a process hardly more memory than it has now."""
    sizes = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines())
    limit = int(sizes["VmData"].split()[0]) * 1024 + SPARE_BYTES
    resource.prlimit(pid, resource.RLIMIT_DATA, (limit, limit))
