"""Start `mta up` for the demo, wait for it, and stop it with the demo."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from deploy.demo.children import DemoError, mta
from mta_client import Client
from server.settings import Settings
from server.supervisor.data_folder import StartError
from server.supervisor.services import LOOPBACK, STOP_S, free_port, listening

_READY_TIMEOUT_S = 300
_STOP_GRACE_S = STOP_S + 5
_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Server:
    """The demo's server."""

    api: Client  # its HTTP API
    process: subprocess.Popen[str]  # `mta up`, behind its guard


@contextmanager
def running_server(bank: Path, data: Path, say: Callable[[str], None]) -> Iterator[Server]:
    """Run a server of `bank` and wait until it is ready; stop all its parts when the block ends.

    Raises:
        DemoError: if it does not become ready.
    """
    port = _port()
    up = ("up", "--bank", str(bank), "--data", str(data), "--port", str(port))
    with (
        mta(*up, grace_s=_STOP_GRACE_S, stdout=subprocess.PIPE) as process,
        Client(f"http://{LOOPBACK}:{port}", trust_env=False) as client,  # no proxy for this machine
    ):
        server = Server(client, process)
        ready = threading.Event()
        threading.Thread(target=_relay, args=(process, ready, say), daemon=True).start()
        _await_ready(server)
        ready.set()
        yield server


def _port() -> int:
    """Return the default port if it is free, so that the documentation's examples work; otherwise any free one."""
    port: int = Settings.model_fields["port"].default
    try:
        listening(LOOPBACK, port).close()
    except StartError:
        return free_port()
    return port


def _await_ready(server: Server) -> None:
    deadline_s = time.monotonic() + _READY_TIMEOUT_S
    while not server.api.ready():
        if server.process.poll() is not None:
            raise DemoError(f"`mta up` ended with status {server.process.returncode}; its message is above")
        if time.monotonic() > deadline_s:
            raise DemoError(f"the server was not ready after {_READY_TIMEOUT_S} s; the output of its parts is above")
        time.sleep(_POLL_S)


def _relay(process: subprocess.Popen[str], ready: threading.Event, say: Callable[[str], None]) -> None:
    """Relay the output of `mta up` until it is ready, and discard the rest, so that `mta up` never blocks on it."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Ready:"):  # the demo prints its own calls to try at the end
            ready.set()
        if line.strip() and not ready.is_set():
            say(line.rstrip())
