"""Start parts once their dependencies are ready, restart those that die, and stop all of them in reverse order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from server.supervisor.data_folder import DataFolder, StartError
from server.supervisor.services import Part

GRACE_S = 2.0  # from the end of `mta up`, whatever its cause, to SIGKILL for remaining processes
POLL_S = 0.1
LOG_CHECK_INTERVAL_S = 60.0
FIRST_RESTART_DELAY_S, MAX_RESTART_DELAY_S = 0.5, 30.0  # the delay doubles with each death in a row
STABLE_AFTER_S = 60.0  # uptime after which the count of deaths in a row starts anew
MAX_DEATHS = 10  # number of deaths in a row after which a part is not restarted
_TAIL_BYTES, _TAIL_LINES = 16 << 10, 20


State = Literal["waiting", "starting", "ready", "down", "given up", "stopping", "stopped"]
Report = Callable[[str, State, str], None]  # called with a part's name, its new state, and a detail to display
_STYLES = {"ready": "green", "down": "bold red", "given up": "bold red"}


class Supervisor:
    """Keeps parts running; starts them in the order of their dependencies and stops them in reverse order."""

    def __init__(self, parts: Sequence[Part], data: DataFolder, report: Report) -> None:
        self._parts, self._data, self._report = tuple(parts), data, report
        self._runs: dict[str, GuardedProcess] = {}
        self._tried = {part.name: asyncio.Event() for part in parts}  # set when ready or, if optional, failed

    async def run(self, stop: asyncio.Event, hurry: asyncio.Event, started: Callable[[], None]) -> None:
        """Run until `stop` is set; all parts have exited when this returns or raises.

        `hurry` ends the time that parts have to finish. `started` is called once, when every required part is ready and
        every optional part is ready or has failed. Raises StartError, with the end of the log, if a required part fails
        its first start or has died too often.
        """
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._run_part(part)) for part in self._parts]
                tasks.append(group.create_task(self._announce(started)))
                await stop.wait()
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            for part in reversed(self._parts):
                if (process := self._runs.get(part.name)) and process.running:
                    self._report(part.name, "stopping", "")
                    await process.stop(part.stop_timeout_s, hurry)
                    self._report(part.name, "stopped", "")

    async def _announce(self, started: Callable[[], None]) -> None:
        for tried in self._tried.values():
            await tried.wait()
        started()

    async def _run_part(self, part: Part) -> None:
        """Start a part once its dependencies have started, and restart it when it ends, until it has died too often."""
        for name in part.needs:
            if other := self._tried.get(name):
                await other.wait()
        while part.start_when is not None and not await part.start_when():  # noqa: ASYNC110  another process
            await asyncio.sleep(POLL_S)
        tried, deaths = self._tried[part.name], 0
        while True:
            self._report(part.name, "starting", part.address)
            process = self._runs[part.name] = await GuardedProcess.start(part, self._data)
            failure = await self._await_ready(part, process)
            if ready := not failure:
                tried.set()
                failure = await self._await_end(part, process)
            deaths = 1 if ready and process.uptime_s >= STABLE_AFTER_S else deaths + 1
            if last := deaths >= MAX_DEATHS:
                failure += f", {deaths} times in a row now"
            tail = "" if ready and not last else self._tail(part)
            if not part.optional and (last or not tried.is_set()):
                raise StartError(f"{part.name} {failure}{tail}")
            tried.set()
            if last:
                self._report(part.name, "given up", f"{failure}; the others go on without it{tail}")
                return
            delay_s = min(MAX_RESTART_DELAY_S, FIRST_RESTART_DELAY_S * 2 ** (deaths - 1))
            self._report(part.name, "down", f"{failure}; starting it again in {delay_s:g} s{tail}")
            await asyncio.sleep(delay_s)

    async def _await_ready(self, part: Part, process: GuardedProcess) -> str:
        """Wait until a part is ready; on failure kill it and return the reason, otherwise return ""."""
        with suppress(TimeoutError):
            async with asyncio.timeout(part.start_timeout_s):
                while process.running:
                    if await part.ready():
                        self._report(part.name, "ready", f"{part.address} after {process.uptime_s:.1f} s")
                        return ""
                    await _first_of(process.wait(), timeout_s=POLL_S)
        if not process.running:
            return f"ended with status {await process.wait()} before it was ready"
        await process.kill()
        return f"was not ready after {part.start_timeout_s:.0f} s"

    async def _await_end(self, part: Part, process: GuardedProcess) -> str:
        """Rotate the log until the part ends; return a description of the end."""
        while process.running:
            with suppress(OSError):  # a full disk
                await asyncio.to_thread(self._data.rotate_large_log, part.name)
            await _first_of(process.wait(), timeout_s=LOG_CHECK_INTERVAL_S)
        return f"ended with status {await process.wait()} after {process.uptime_s:.0f} s"

    def _tail(self, part: Part) -> str:
        log, lines = self._data.log(part.name), list[str]()
        with suppress(OSError), log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").rstrip().splitlines()
        return "\n".join([f". The end of {log}:", *lines[-_TAIL_LINES:]])


@dataclass(slots=True)
class GuardedProcess:
    """One run of a part under its guard (`guard.py`), from the spawn to the exit of its last descendant."""

    _process: asyncio.subprocess.Process
    _started_s: float = field(default_factory=time.monotonic)

    @classmethod
    async def start(cls, part: Part, data: DataFolder) -> GuardedProcess:
        log = data.start_log(part.name)
        try:
            process = await asyncio.create_subprocess_exec(
                *guarded(part.command, GRACE_S, part.niceness),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=dict(part.environment),
                pass_fds=(data.lock,),
                start_new_session=True,  # only this process gets Ctrl-C, so that it can stop the parts in order
            )
        finally:
            os.close(log)
        return cls(process)

    @property
    def uptime_s(self) -> float:
        return time.monotonic() - self._started_s

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    async def wait(self) -> int:
        """Wait until the part and its descendants have exited; return the status, 128 + n after signal n."""
        code = await self._process.wait()
        if code < 0:  # the guard was killed before it could clean up its process group
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            return 128 - code
        return code

    async def stop(self, timeout_s: float, hurry: asyncio.Event) -> None:
        """Ask the part to finish; kill it and its descendants after `timeout_s` or once `hurry` is set."""
        assert self._process.stdin
        with suppress(BrokenPipeError, ConnectionResetError):
            self._process.stdin.write(b".")
        await _first_of(self.wait(), hurry.wait(), timeout_s=timeout_s)
        await self.kill()

    async def kill(self) -> None:
        """End the part and its descendants within the guard's grace period."""
        assert self._process.stdin
        self._process.stdin.close()
        await _first_of(self.wait(), timeout_s=2 * GRACE_S)
        if self.running:  # the guard does not answer
            self._process.kill()
        await self.wait()


def guarded(command: Sequence[str], grace_s: float, niceness: int = 0) -> list[str]:
    """Return the command line that runs a command under a guard; it has `grace_s` to stop once stdin is closed."""
    return [sys.executable, "-I", str(Path(__file__).with_name("guard.py")), str(grace_s), str(niceness), *command]


async def _first_of(*awaited: Awaitable[object], timeout_s: float | None = None) -> None:
    waiting = [asyncio.ensure_future(one) for one in awaited]
    try:
        await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in waiting:
            one.cancel()


class PipeSafeConsole(Console):
    """A console that drops output after a broken pipe: `mta up | head` must not end the server."""

    def on_broken_pipe(self) -> None:
        with suppress(SystemExit):
            super().on_broken_pipe()


class Status:
    """Print a line for each change of a part; on a terminal, update a table in place until `close`."""

    def __init__(self, console: Console, parts: Sequence[str]) -> None:
        self._console = console
        self._states: dict[str, tuple[State, str, float]] = {part: ("waiting", "", time.monotonic()) for part in parts}
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=8)
        if console.is_terminal:
            self._live.start()

    def __call__(self, part: str, state: State, detail: str) -> None:
        if self._live.is_started:
            self._states[part] = (state, detail, time.monotonic())
            self._live.refresh()
        else:
            line = Text(f"  {part:<9}").append(f"{state:<9}", _STYLES.get(state, "")).append(f" {detail}")
            self._console.print(line, soft_wrap=True)

    def close(self) -> None:
        self._live.stop()

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for part, (state, detail, since_s) in self._states.items():
            busy = state in ("starting", "stopping")
            shown = Spinner("dots", f"{state} {time.monotonic() - since_s:.0f} s") if busy else Text(state)
            table.add_row(f"  {part}", shown, detail, style=_STYLES.get(state, ""))
        return table
