"""Run `mta` commands that never outlive the demo, however it ends."""

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
    """The demo cannot continue; the message is for the user."""


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
    """Run one `mta` command to its end; it shares our output.

    Raises:
        DemoError: if it fails.
    """
    with mta(*arguments, grace_s=_STOP_GRACE_S) as child:
        status = child.wait()
    if status != 0:
        raise DemoError(f"`mta {arguments[0]}` ended with status {status}; its message is above")
