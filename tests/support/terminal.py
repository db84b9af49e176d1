"""A program in a terminal of its own, and somebody who types."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.rig.processes import PATIENCE_S

CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """Its screen, as one long text; `master` is the end of the terminal that is not the program's."""

    def __init__(self, master: int, process: subprocess.Popen[bytes]) -> None:
        self._master = master
        self._seen = ""
        self.process = process

    def type(self, text: str, *shown: str) -> None:
        """Press keys, and wait until the screen shows what is to follow."""
        os.write(self._master, text.encode())
        for pattern in shown:
            self.wait_for(pattern)

    def wait_for(self, pattern: str, patience_s: float = PATIENCE_S) -> re.Match[str]:
        """Wait until the screen shows something; what comes before it and itself is not looked at again."""
        deadline_s = time.monotonic() + patience_s
        while not (match := re.search(pattern, self._seen)):
            assert time.monotonic() < deadline_s, f"no {pattern!r} in {self._seen!r}"
            if select.select([self._master], [], [], 0.1)[0]:
                try:
                    self._seen += os.read(self._master, 1 << 16).decode("utf-8", "replace")
                except OSError as gone:  # the program has ended, and with it the terminal
                    raise AssertionError(f"ended before {pattern!r}: {self._seen!r}") from gone
        self._seen = self._seen[match.end() :]
        return match


@contextmanager
def terminal(command: Sequence[str], cwd: Path | None = None) -> Iterator[Terminal]:
    """Run a program in a terminal, where Ctrl-C interrupts it; it is gone when the block ends."""
    master, slave = os.openpty()
    # A shell's background job ignores SIGINT, and so would its children.
    command = ["setsid", "--ctty", "env", "--default-signal=INT", *command]
    process = subprocess.Popen(command, cwd=cwd, stdin=slave, stdout=slave, stderr=slave)
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        process.kill()
        process.wait()
        os.close(master)
