"""Requests made up from the gateway's own OpenAPI document, in good order and out of it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from server.gateway.access.routes import OPEN, ROUTES
from server.gateway.app import create_app
from server.settings import Settings
from tests.support.gateway import GatewayThread, wait_until_ready

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(autouse=True, scope="module")
def no_collection() -> Iterator[None]:
    """Before 3.11.8, Python mixes up two threads that parse source at once, and only a collection lets them.

    Hypothesis parses to describe what it draws; the gateway's thread does to print a traceback. The sign is a
    `SystemError: AST constructor recursion depth mismatch`.
    """
    gc.disable()
    yield
    gc.enable()


@pytest.fixture(autouse=True, scope="module")
def seen(gateway: GatewayThread) -> None:
    """A gateway that is not ready says so with 503, which is no fault of its."""
    with gateway.client() as client:
        wait_until_ready(client)


schema = schemathesis.openapi.from_dict(create_app(Settings()).openapi())


@pytest.fixture
def jobs(client: httpx.Client, new_user: Callable[[], str]) -> tuple[str, str]:
    """A job that waits, and one that has ended."""
    waiting, ended = (
        client.post(f"/users/{new_user()}/adapt", json={"samples": [{"input": "q", "output": "a"}]}).json()["id"]
        for _ in range(2)
    )
    client.delete(f"/jobs/{ended}").raise_for_status()
    return waiting, ended


@pytest.mark.usefixtures("free_event_loop")
@schema.parametrize()
@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_no_request_makes_the_gateway_fail(
    case: schemathesis.Case, gateway: GatewayThread, jobs: tuple[str, str]
) -> None:
    drawn = case.path_parameters.get("job_id")
    if isinstance(drawn, str) and len(drawn) % 2:  # a job that there is: nobody draws one
        waiting, ended = jobs
        case.path_parameters["job_id"] = ended if case.path.endswith("/events") or len(drawn) % 4 == 1 else waiting
    case.call_and_validate(base_url=gateway.url, checks=CHECKS)


def test_every_route_is_tried() -> None:
    tried = {(operation.ok().method.upper(), operation.ok().path) for operation in schema.get_all_operations()}
    closed = {route.replace(":path", "") for route, scope in ROUTES.items() if scope is not OPEN}
    assert {f"{method} {path}" for method, path in tried} >= closed | {"GET /health", "GET /ready"}
