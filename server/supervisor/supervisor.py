"""Start parts once their dependencies are ready, restart those that die, and stop all of them in reverse order."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from server.supervisor.data_folder import DataFolder, StartError
from server.supervisor.services import Part

GUARD_MARGIN_S = 2.0  # from the time when a guard kills a part to its own exit
POLL_S = 0.1
LOG_CHECK_INTERVAL_S = 60.0
FIRST_RESTART_DELAY_S, MAX_RESTART_DELAY_S = 0.5, 30.0  # the delay doubles with each death in a row
STABLE_AFTER_S = 60.0  # uptime after which the count of deaths in a row starts anew
MAX_DEATHS = 10  # number of deaths in a row after which a part is not restarted

State = Literal["starting", "ready", "down", "given up", "stopping", "stopped"]
Report = Callable[[str, State, str], None]  # called with a part's name, its new state, and a detail to display
_STYLES = {"ready": "green", "down": "bold red", "given up": "bold red"}


class Supervisor:
    def __init__(self, parts: Sequence[Part], data: DataFolder, report: Report, stop_timeout_s: float) -> None:
        self._parts, self._data, self._report, self._stop_timeout_s = tuple(parts), data, report, stop_timeout_s
        self._running: dict[str, Process] = {}  # the guards
        self._tried = {part.name: asyncio.Event() for part in parts}  # set when ready or, if optional, failed
        self._stopping = asyncio.Event()

    async def run(self, started: Callable[[], None]) -> None:
        """Run until a signal or `stop`; all parts have exited when this returns or raises.

        `started` is called once, when every required part is ready and every optional part is ready or has failed.
        Raises StartError, with the end of the log, if a required part fails its first start or has died too often.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` ignores it
                asyncio.get_running_loop().add_signal_handler(number, self.stop)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._run_part(part)) for part in self._parts]
                tasks.append(group.create_task(self._announce(started)))
                await self._stopping.wait()
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        finally:
            for part in reversed(self._parts):
                if process := self._running.get(part.name):
                    self._report(part.name, "stopping", "")
                    await end(process, self._stop_timeout_s)
                    self._report(part.name, "stopped", "")

    def stop(self) -> None:
        """Ask all parts to finish; a second call ends the time that they have for it."""
        for process in self._running.values() if self._stopping.is_set() else ():
            process.stdin.close()  # type: ignore[union-attr]  # it is a pipe
        self._stopping.set()

    async def _announce(self, started: Callable[[], None]) -> None:
        for tried in self._tried.values():
            await tried.wait()
        started()

    async def _run_part(self, part: Part) -> None:
        """Start a part once its dependencies have started, and restart it when it ends, until it has died too often."""
        for name in self._tried.keys() & part.needs:
            await self._tried[name].wait()
        tried, deaths = self._tried[part.name], 0
        while True:
            ready, uptime_s, failure = await self._run_once(part)
            deaths = 1 if ready and uptime_s >= STABLE_AFTER_S else deaths + 1
            if last := deaths >= MAX_DEATHS:
                failure += f", {deaths} times in a row now"
            tail = "" if ready and not last else self._data.tail(part.name)
            if not part.optional and (last or not tried.is_set()):
                raise StartError(f"{part.name} {failure}{tail}")
            tried.set()
            if last:
                self._report(part.name, "given up", f"{failure}; the others go on without it{tail}")
                return
            delay_s = min(MAX_RESTART_DELAY_S, FIRST_RESTART_DELAY_S * 2 ** (deaths - 1))
            self._report(part.name, "down", f"{failure}; starting it again in {delay_s:g} s{tail}")
            await asyncio.sleep(delay_s)

    async def _run_once(self, part: Part) -> tuple[bool, float, str]:
        """Run a part until it ends, and rotate its log; return whether it was ready, its uptime, and how it ended."""
        self._report(part.name, "starting", part.address)
        started_s, uptime_s = time.monotonic(), 0.0
        try:
            process = self._running[part.name] = await spawn(part, self._data, self._stop_timeout_s)
        except OSError as error:  # too many processes or files
            return False, 0.0, f"could not be started: {error}"
        ended, ready, failure, advice = asyncio.create_task(process.wait()), False, "", ""
        while not ended.done():
            if ready:
                with suppress(OSError):  # a full disk
                    await asyncio.to_thread(self._data.rotate_large_log, part.name)
            elif not await part.is_ready(self._data.log(part.name)):
                if uptime_s > part.start_timeout_s:
                    failure = f"was not ready after {part.start_timeout_s:.0f} s"
                    await end(process, self._stop_timeout_s)
            elif needed := part.held_up and await part.held_up():
                if needed != advice:
                    self._report(part.name, "starting", advice := needed)
            else:
                ready = True
                self._tried[part.name].set()
                self._report(part.name, "ready", f"{part.address} after {uptime_s:.1f} s")
            await asyncio.wait([ended], timeout=LOG_CHECK_INTERVAL_S if ready else POLL_S)
            uptime_s = time.monotonic() - started_s
        del self._running[part.name]
        if ended.result() < 0:  # the guard was killed before it could clean up; its part has died with it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        when = f"after {uptime_s:.0f} s" if ready else "before it was ready"
        return ready, uptime_s, failure or f"ended with status {ended.result()} {when}"


async def spawn(part: Part, data: DataFolder, stop_timeout_s: float) -> Process:
    """Start a part under its guard (`guard.py`); the process returned is the guard, which outlives all descendants."""
    log = data.start_log(part.name)
    try:
        return await asyncio.create_subprocess_exec(
            *guarded(part.command, stop_timeout_s, part.niceness),
            stdin=asyncio.subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=part.environment,
            pass_fds=(data.lock,),
            start_new_session=True,  # only this process gets Ctrl-C, so that it can stop the parts in order
        )
    finally:
        os.close(log)


async def end(process: Process, stop_timeout_s: float) -> None:
    """Ask a part to finish; its guard kills it after the timeout, but stays while the kernel cannot end a process."""
    process.stdin.write(b".")  # type: ignore[union-attr]  # it is a pipe
    await asyncio.wait([asyncio.create_task(process.wait())], timeout=stop_timeout_s + GUARD_MARGIN_S)


def guarded(command: Sequence[str], stop_timeout_s: float, niceness: int = 0) -> list[str]:
    """Return the command line that runs a command under a guard; a byte on stdin asks it to stop within the timeout."""
    guard = str(Path(__file__).with_name("guard.py"))
    return [sys.executable, "-I", guard, str(stop_timeout_s), str(niceness), *command]


class Display:
    """Prints lines; until `close`, it keeps one line a part up to date if this is a terminal."""

    def __init__(self) -> None:
        self._console, self._lines = Console(highlight=False), dict[str, RenderableType]()
        self._live = Live(console=self._console, get_renderable=lambda: Group(*self._lines.values()))
        if self._console.is_terminal:
            self._live.start()

    def close(self) -> None:
        with suppress(OSError):
            self._live.stop()

    def say(self, line: RenderableType) -> None:
        with suppress(SystemExit, OSError):  # rich's for a broken pipe, as in `mta up | head`; the terminal was closed
            self._console.print(line, soft_wrap=True)

    def report(self, part: str, state: State, detail: str) -> None:
        line = Text(f"  {part:<9}").append(f"{state:<9}", _STYLES.get(state, "")).append(f" {detail}")
        if self._live.is_started:
            self._lines[part] = Spinner("dots", line[2:]) if state in ("starting", "stopping") else line
            with suppress(OSError):
                self._live.refresh()
        else:
            self.say(line)
