"""The router in front of several engines: the same recipe goes to the same engine, while that one can be reached.

It is `vllm-router`, which finds an engine by hashing `X-Session-ID`. What its defaults leave to chance or to minutes is
set here, once, for `mta up` and for containers (`mta router`).
"""

from __future__ import annotations

import os
import sys

from server.settings import Settings
from server.supervisor.parts import Part, answers_http
from server.supervisor.services import BEYOND_DRAIN_S, ENGINE_START_S

METRICS_PORT = 29000  # unless the settings name another
LIVENESS = "/liveness"
"""Answers 200 as soon as the router listens, whatever its engines do."""

OPTIONS: dict[str, object] = {
    "policy": "consistent_hash",
    # Session ids are recipe names, which name anchors and, where there is one, a user's adapter: at `info` each request
    # logs its own. `warning` would do, but the router does not know that word and falls back to `info`.
    "log-level": "error",
    # An engine that stopped answering gets no more requests after 2 to 6 s, and some again within 1 s of its return.
    "health-check-interval-secs": 1,
    "health-check-timeout-secs": 2,
    "health-failure-threshold": 2,
    "health-success-threshold": 1,
    # Faster still for one that refuses: the second failure in a row opens its breaker, and the same request goes on to
    # another engine at its third try. A refusal of the request itself (4xx) is no failure.
    "cb-failure-threshold": 2,
    "cb-success-threshold": 1,
    "cb-timeout-duration-secs": 3,
    "cb-window-duration-secs": 10,
    "retry-max-retries": 4,
    "retry-initial-backoff-ms": 20,
    "retry-max-backoff-ms": 200,
    "retry-backoff-multiplier": 2,
    "retry-jitter-factor": 0.5,
    # The gateway decides how long an answer may take, and how many there are at once.
    "request-timeout-secs": 24 * 3600,
    "max-concurrent-requests": 65536,
    "queue-size": 0,
    "max-payload-size": 64 << 20,
    # At its start it waits for the first of its engines.
    "worker-startup-timeout-secs": ENGINE_START_S,
    "worker-startup-check-interval": 1,
}


def router_command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """argv and environment of the router in front of `MTA_ENGINE_URLS`; no secret: keys pass through with requests."""
    argv = [sys.executable, "-m", "vllm_router.launch_router"]
    argv += ["--host", settings.inner_host, "--port", str(settings.router_port)]
    argv += ["--prometheus-host", settings.inner_host, "--prometheus-port", str(settings.metrics_port or METRICS_PORT)]
    for option, value in OPTIONS.items():
        argv += [f"--{option}", str(value)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MTA_")}
    environment.pop("RUST_LOG", None)  # it would be heeded before the log level
    return [*argv, "--worker-urls", *settings.engines], environment


def router_part(settings: Settings) -> Part:
    """The router as a part of `mta up`: it starts beside its engines, and listens once one of them answers."""
    argv, environment = router_command(settings)
    return Part(
        name="router",
        command=tuple(argv),
        environment=environment,
        ready=answers_http(f"http://{settings.inner_host}:{settings.router_port}{LIVENESS}"),
        address=f"{settings.inner_host}:{settings.router_port}",
        start_timeout_s=ENGINE_START_S,
        stop_timeout_s=settings.drain_s + BEYOND_DRAIN_S,
        needs=(),
    )
