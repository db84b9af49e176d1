"""The guard of one part: a small process between `mta up` and the part; nothing that the part starts outlives it.

    python -I guard.py GRACE_S NICENESS COMMAND [ARGUMENT…]

A byte on standard input asks the part to stop. End of file, as `mta up` closed it or died, means that all must be gone
within GRACE_S seconds. When the part ends, the guard kills what it left behind and exits with its status (128 + n after
signal n). As a *subreaper* it inherits every orphan among its descendants, in whatever session or group, so "no
children" means that nothing is left; by its *parent-death signal* the part dies with the guard, should that be killed.
Only the standard library: this file runs by path, in one small interpreter per part.
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


def main() -> int:
    """Run the command in argv under guard; the exit status is the command's."""
    grace_s, niceness, command = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    # A signal sent to all processes (a shutdown, a closed terminal) reaches the part directly; we stay to clean up.
    # A handler rather than SIG_IGN, which the part would inherit.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    if niceness:  # as a whole session: a kernel that shares cores out among sessions weighs niceness only within one
        os.nice(niceness)
        with suppress(OSError):  # another kernel
            Path("/proc/self/autogroup").write_text(str(niceness), "utf-8")
    part = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0),  # noqa: PLW1509  no threads here
    )
    try:
        ended = os.pidfd_open(part.pid)
        while ended not in select.select([ended, STDIN], [], [])[0]:
            part.terminate()
            if not os.read(STDIN, 1):
                select.select([ended], [], [], grace_s)
                part.kill()
                break
        part.wait()
    finally:
        _kill_children()
    return part.returncode if part.returncode >= 0 else 128 - part.returncode


def _kill_children() -> None:
    """Kill our children, and theirs as they become ours, until there are none."""
    while True:
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):  # it ended while we looked
                if stat.read_text("utf-8", "replace").rpartition(")")[2].split()[1] == str(os.getpid()):
                    os.kill(int(stat.parent.name), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


if __name__ == "__main__":
    sys.exit(main())
