"""Run `mta` commands that never outlive the demo, however it ends; one of them is its server."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from adapters.errors import MtaError
from demo.bank import cached_bank
from demo.personas import anchors
from mta_client import Client
from server.settings import Settings
from server.supervisor.data_folder import StartError
from server.supervisor.services import LOOPBACK, STOP_S, free_port, listening
from server.supervisor.supervisor import guarded

_OWN = ("MTA_CACHE_DIR", "MTA_DTYPE")
_COMMAND_GRACE_S = 10
_SERVER_GRACE_S = STOP_S + 5
_READY_TIMEOUT_S = 300
_POLL_S = 0.25


class DemoError(MtaError):
    """The demo cannot continue; the message is for the user."""


@dataclass(frozen=True, slots=True)
class Server:
    api: Client
    process: subprocess.Popen[str]  # `mta up`, behind its guard


@contextmanager
def mta(*arguments: str, grace_s: float, stdout: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run one `mta` command; stop it and everything it started when the block ends.

    The command runs under the same guard as the parts of `mta up`, which stops it within `grace_s`, or within seconds
    if this process was killed.
    """
    # The settings of a real server must not reach the demo's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MTA_") or name in _OWN}
    child = subprocess.Popen(
        guarded([sys.executable, "-m", "server.cli", *arguments], grace_s),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=stdout,
        text=True,
        start_new_session=True,  # only the demo gets Ctrl-C, so that it can stop everything in order
    )
    try:
        yield child
    finally:
        assert child.stdin
        with suppress(BrokenPipeError):
            print(end=".", file=child.stdin, flush=True)
        child.wait()


def run_mta(*arguments: str) -> None:
    """Run one `mta` command to its end; it shares our output. DemoError if it fails."""
    with mta(*arguments, grace_s=_COMMAND_GRACE_S) as child:
        status = child.wait()
    if status != 0:
        raise DemoError(f"`mta {arguments[0]}` ended with status {status}; its message is above")


def demo_bank() -> Path:
    """Return the demo's bank; build it if it is missing. DemoError if it cannot be built."""
    return cached_bank(anchors(), Settings().cache_dir, run_mta)


@contextmanager
def running_server(bank: Path, data: Path, say: Callable[[str], None]) -> Iterator[Server]:
    """Run a server of `bank` and wait until it is ready, or raise DemoError; stop all parts when the block ends."""
    port = _port()
    up = ("up", "--bank", str(bank), "--data", str(data), "--port", str(port))
    with (
        mta(*up, grace_s=_SERVER_GRACE_S, stdout=subprocess.PIPE) as process,
        Client(f"http://{LOOPBACK}:{port}", trust_env=False) as client,  # no proxy for this machine
    ):
        ready, deadline_s = threading.Event(), time.monotonic() + _READY_TIMEOUT_S
        threading.Thread(target=_relay, args=(process, ready, say), daemon=True).start()
        while not client.ready():
            if process.poll() is not None:
                raise DemoError(f"`mta up` ended with status {process.returncode}; its message is above")
            if time.monotonic() > deadline_s:
                raise DemoError(f"the server was not ready after {_READY_TIMEOUT_S} s; its parts' output is above")
            time.sleep(_POLL_S)
        ready.set()
        yield Server(client, process)


def _port() -> int:
    """Return the default port if it is free, so that the documentation's examples work; otherwise any free one."""
    port: int = Settings.model_fields["port"].default
    try:
        listening(LOOPBACK, port).close()
    except StartError:
        return free_port()
    return port


def _relay(process: subprocess.Popen[str], ready: threading.Event, say: Callable[[str], None]) -> None:
    """Relay the output of `mta up` until it is ready, and discard the rest, so that `mta up` never blocks on it."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("Ready:"):  # the demo prints its own calls to try at the end
            ready.set()
        if line.strip() and not ready.is_set():
            say(line.rstrip())
