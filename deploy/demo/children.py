"""Running `mta` commands that never outlive the demo, however it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from server.supervisor.supervisor import guarded

_STOP_GRACE_S = 10
_OWN = ("MTA_CACHE_DIR", "MTA_DTYPE")


class DemoError(Exception):
    """The demo cannot go on; the message is for the person who started it."""


@contextmanager
def mta(*arguments: str, grace_s: float, stdout: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """One `mta` command; it and everything it started are gone when the block ends.

    It runs under the same guard as the parts of `mta up`: when the guard's standard input closes, because the block
    ended or because this process was killed, the command is asked to stop.
    """
    # The settings of a real server must not reach the demo's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MTA_") or name in _OWN}
    child = subprocess.Popen(
        guarded([sys.executable, "-m", "server.cli", *arguments], grace_s),
        env=environment,
        stdin=subprocess.PIPE,
        stdout=stdout,
        text=True,
        start_new_session=True,  # Ctrl-C reaches the demo alone, which then stops things in order
    )
    try:
        yield child
    finally:
        if child.stdin is not None:
            with suppress(BrokenPipeError):
                child.stdin.close()
        child.wait()


def run_mta(*arguments: str) -> None:
    """Run one `mta` command to its end; it shares our output.

    Raises:
        DemoError: when it fails.
    """
    with mta(*arguments, grace_s=_STOP_GRACE_S) as child:
        status = child.wait()
    if status != 0:
        raise DemoError(f"`mta {arguments[0]}` ended with status {status}; its message is above")
