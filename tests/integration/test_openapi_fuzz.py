"""Requests generated from the gateway's own OpenAPI document, valid and invalid."""

from __future__ import annotations

import gc
from collections.abc import Iterator

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
from tests.support.calls import NewUser, adapt, put
from tests.support.gateway import GatewayThread, wait_until_ready

LONGEST_S = 10.0
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(autouse=True, scope="module")
def ready(gateway: GatewayThread) -> Iterator[None]:
    """Before 3.11.8, garbage collections while two threads parse source, as Hypothesis does, raise `SystemError`."""
    with gateway.client() as client:
        wait_until_ready(client)
    gc.disable()
    yield
    gc.enable()


schema = schemathesis.openapi.from_dict(create_app(Settings()).openapi())


@pytest.fixture
def known(client: httpx.Client, new_user: NewUser) -> str:
    """A user with a history."""
    user_id = new_user()
    put(client, user_id)
    return user_id


@pytest.fixture
def jobs(client: httpx.Client, known: str) -> list[str]:
    """A job that waits, and one that has ended."""
    ids = [adapt(client, user_id).json()["id"] for user_id in (known, f"{known}-too")]
    client.delete(f"/jobs/{ids[1]}").raise_for_status()
    return ids


@pytest.mark.usefixtures("free_event_loop")
@schema.parametrize()
@settings(max_examples=40, database=None, suppress_health_check=list(HealthCheck))
def test_no_request_makes_the_gateway_fail(
    case: schemathesis.Case, gateway: GatewayThread, known: str, jobs: list[str]
) -> None:
    for fields in (case.path_parameters, case.body):  # nor are known users
        if isinstance(fields, dict) and isinstance(name := fields.get("user_id"), str) and len(name) % 2:
            fields["user_id"] = known
    drawn = case.path_parameters.get("job_id")
    if isinstance(drawn, str) and len(drawn) % 2:  # use the id of a real job, which is never drawn by chance
        case.path_parameters["job_id"] = jobs[case.path.endswith("/events") or len(drawn) % 4 == 1]
    response = case.call_and_validate(base_url=gateway.url, checks=CHECKS)
    assert response.elapsed < LONGEST_S


def test_every_route_is_tried() -> None:
    tried = {(operation.ok().method.upper(), operation.ok().path) for operation in schema.get_all_operations()}
    closed = {route.replace(":path", "") for route, (scope, _) in ROUTES.items() if scope is not OPEN}
    assert {f"{method} {path}" for method, path in tried} >= closed | {"GET /health", "GET /ready"}
