"""The guard of one part: a small process between `mta up` and the part that cleans up all descendants of the part.

    python -I guard.py STOP_TIMEOUT_S NICENESS COMMAND [ARGUMENT…]

A byte on standard input asks the part to stop within STOP_TIMEOUT_S; end of file then ends that time. End of file alone
means that `mta up` died: the part must exit within GRACE_S. When the part exits, the guard kills its remaining
descendants and exits with the part's status (128 + n after signal n). It inherits all orphaned descendants in any
session or group (a *subreaper*), so "no children" means that nothing is left; the part dies with the guard. This file
imports only the standard library: it runs by path, in one small interpreter per part.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
STDIN = 0
GRACE_S = 2.0


def main() -> int:
    stop_timeout_s, niceness, command = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    # A signal to all processes (a shutdown, a closed terminal) reaches the part directly; the guard stays to clean up.
    # This needs a handler, since the part would inherit SIG_IGN.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    if niceness:  # also for the whole session: with autogroups, a process's niceness counts only within its session
        os.nice(niceness)
        with suppress(OSError):  # a kernel without autogroups
            Path("/proc/self/autogroup").write_text(str(niceness), "utf-8")
    part = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),  # noqa: PLW1509  no threads here
    )
    try:
        ended = os.pidfd_open(part.pid)
        if ended not in select.select([ended, STDIN], [], [])[0]:
            part.terminate()
            asked = os.read(STDIN, 1)
            select.select([ended, STDIN] if asked else [ended], [], [], stop_timeout_s if asked else GRACE_S)
            part.kill()
        part.wait()
    finally:
        _kill_children()
    return part.returncode if part.returncode >= 0 else 128 - part.returncode


def _kill_children() -> None:
    """Kill our children until there are none; orphaned grandchildren become our children."""
    while True:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # the process has exited in the meantime
                if stat.read_text("utf-8", "replace").rpartition(")")[2].split()[1] == str(os.getpid()):
                    os.kill(int(stat.parent.name), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    sys.exit(main())
