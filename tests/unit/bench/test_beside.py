"""Jobs beside a block of answers: always one in training, and a failure is not taken for one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from bench.adapt import beside
from bench.adapt.beside import training
from server.supervisor.services import free_port

Job = dict[str, Any]


class Jobs:
    """A server that keeps jobs as ours does: what has no key of its own is the last job again, if that went well."""

    def __init__(self) -> None:
        self.after: Callable[[int], str] = lambda looks: "running"  # a job's state, by how often it was looked at
        self.jobs: list[Job] = []
        self.refusing = False
        self._keys: list[str | None] = []
        self._looks: list[int] = []

    async def post(self, request: web.Request) -> web.Response:
        if self.refusing:
            return web.json_response({}, status=422)
        key = (await request.json()).get("idempotency_key")
        if self.jobs and (key in self._keys if key else self.jobs[-1]["state"] in ("running", "succeeded")):
            return web.json_response(self.jobs[-1])
        job = {"id": str(len(self.jobs)), "state": "running", "ended_at": None, "progress": {"step": 0}, "error": None}
        self.jobs.append(job)
        self._keys.append(key)
        self._looks.append(0)
        return web.json_response(job, status=202)

    async def get(self, request: web.Request) -> web.Response:
        place = int(request.match_info["job"])
        job = self.jobs[place]
        if job["ended_at"] is None:
            self._looks[place] += 1
            job["progress"] = {"step": self._looks[place]}
            self._end(job, self.after(self._looks[place]))
        return web.json_response(job)

    async def cancel(self, request: web.Request) -> web.Response:
        job = self.jobs[int(request.match_info["job"])]
        if job["ended_at"]:
            return web.json_response({}, status=409)
        self._end(job, "cancelled")
        return web.json_response(job)

    def _end(self, job: Job, state: str) -> None:
        if state != "running":
            job |= {"state": state, "ended_at": "now", "error": "no memory" if state == "failed" else None}


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    monkeypatch.setattr(beside, "POLL_S", 0.001)
    monkeypatch.setattr(beside, "PATIENCE_S", 5)
    return Jobs()


@pytest.fixture
async def session(jobs: Jobs) -> AsyncIterator[aiohttp.ClientSession]:
    app, port = web.Application(), free_port()
    app.router.add_post("/users/{user}/adapt", jobs.post)
    app.router.add_get("/jobs/{job}", jobs.get)
    app.router.add_delete("/jobs/{job}", jobs.cancel)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        yield session
    await runner.cleanup()


async def test_a_job_that_succeeds_is_followed_by_another(jobs: Jobs, session: aiohttp.ClientSession) -> None:
    jobs.after = lambda looks: "succeeded" if looks == 3 else "running"
    for block in (1, 2):
        async with asyncio.timeout(5), training(session, []):
            while len(jobs.jobs) < 4 * block:
                await asyncio.sleep(0.001)
    assert {job["state"] for job in jobs.jobs} <= {"succeeded", "cancelled"}


async def test_the_last_job_is_cancelled_and_timed(jobs: Jobs, session: aiohttp.ClientSession) -> None:
    cancels_ms: list[float] = []
    for _ in range(2):
        async with training(session, cancels_ms):
            assert jobs.jobs[-1]["progress"]["step"] > 0
    assert [job["state"] for job in jobs.jobs] == ["cancelled", "cancelled"]
    assert len(cancels_ms) == 2


async def test_a_job_that_fails_ends_the_block_and_a_server_that_refuses_jobs_is_noticed_at_once(
    jobs: Jobs, session: aiohttp.ClientSession
) -> None:
    jobs.after = lambda looks: "failed" if looks == 3 else "running"
    with pytest.raises(ExceptionGroup) as failed:
        async with asyncio.timeout(5), training(session, []):
            await asyncio.Event().wait()
    assert "job 0 failed: no memory" in str(failed.value.exceptions[0])
    jobs.refusing = True
    with pytest.raises(ExceptionGroup) as refused:
        async with asyncio.timeout(1), training(session, []):
            pass
    assert "POST /users/bench-beside-trained/adapt" in str(refused.value.exceptions[0])
