"""HEAD is answered as GET is, without a body."""

from __future__ import annotations

import httpx
import pytest

from bench.rig.processes import wait_until
from tests.support.gateway import GatewayThread

SAMPLES = [{"input": "q", "output": "a"}]


@pytest.fixture
def job(client: httpx.Client, ada: str) -> str:
    """A job that waits for a worker."""
    response = client.post(f"/users/{ada}/adapt", json={"samples": SAMPLES}).raise_for_status()
    return str(response.json()["id"])


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/users/{user}", "/users/nobody", "/jobs/{job}"])
def test_status_and_headers_are_those_of_get(client: httpx.Client, ada: str, job: str, path: str) -> None:
    path = path.format(user=ada, job=job)
    got, headed = client.get(path), client.head(path)
    assert headed.status_code == got.status_code
    assert headed.content == b""
    changing = {"date", "x-request-id"} | ({"content-length"} if path == "/metrics" else set())
    assert dict(headed.headers) | dict.fromkeys(changing) == dict(got.headers) | dict.fromkeys(changing)


def test_events_are_not_waited_for(client: httpx.Client, job: str, gateway: GatewayThread) -> None:
    response = client.head(f"/jobs/{job}/events")
    assert response.status_code == 200
    assert response.headers["Content-Type"].startswith("text/event-stream")
    series = 'mta_requests_total{level="",method="HEAD",route="/jobs/{job_id}/events",status="200"}'
    wait_until(lambda: series in client.get("/metrics").text, "the request to be over")


def test_a_route_without_get_says_which_methods_are_right(client: httpx.Client) -> None:
    response = client.head("/generate")
    assert (response.status_code, response.headers["Allow"]) == (405, "POST")


def test_the_api_document_does_not_repeat_itself(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    assert not [path for path, methods in paths.items() if "head" in methods]
