"""Starts each part once those it needs are ready, restarts the ones that die, and stops all of them in reverse."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from server.supervisor.data_folder import DataFolder
from server.supervisor.errors import StartError
from server.supervisor.guarded import GuardedProcess
from server.supervisor.part import Backoff, Part
from server.supervisor.status import Report, State
from server.watching.background import forever

log = logging.getLogger("mta.up")

POLL_S = 0.1
LOG_LOOK_S = 60.0


class Supervisor:
    """Keeps parts running.

    Args:
        parts: those that a part needs stand before it.
        data: where the logs are, and whose lock the guards share.
        report: called with every change of state.
        backoff: how long a part that died waits for its restart.
    """

    def __init__(self, parts: Sequence[Part], data: DataFolder, report: Report, backoff: Backoff | None = None) -> None:
        self._parts = tuple(parts)
        self._data = data
        self._report = report
        self._keepers = [_Keeper(part, data, report, backoff or Backoff()) for part in parts]
        self._tried = {part.name: asyncio.Event() for part in parts}  # ready, or a spare one whose first start failed

    async def run(self, stop: asyncio.Event, hurry: asyncio.Event, started: Callable[[], None]) -> None:
        """Run until `stop` is set; no part is left when this returns or raises.

        Args:
            stop: ends the run, at any time.
            hurry: once set, parts get no more time to finish.
            started: called once, when every part is ready, or is spare and has failed to be.

        Raises:
            StartError: when a part that the others cannot do without does not become ready on its first start, or has
                died too often; includes the end of its log.
        """
        life = asyncio.create_task(self._live(started))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait((life, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            life.cancel()
            stopping.cancel()
            outcome, _ = await asyncio.gather(life, stopping, return_exceptions=True)
            for keeper in reversed(self._keepers):
                await keeper.stop(hurry)
        if isinstance(outcome, Exception):
            raise outcome

    async def _live(self, started: Callable[[], None]) -> None:
        """Start every part, then keep all of them running for ever."""
        lives = [
            forever(LOG_LOOK_S, self._empty_large_logs, log),
            self._tell(started),
            *(self._run(place) for place in range(len(self._parts))),
        ]
        living = [asyncio.create_task(life) for life in lives]
        try:
            await asyncio.gather(*living)
        finally:
            for task in living:
                task.cancel()
            await asyncio.gather(*living, return_exceptions=True)

    async def _run(self, place: int) -> None:
        """Start one part, as soon as those it needs have been, and keep it running for ever."""
        part, keeper = self._parts[place], self._keepers[place]
        for other in self._parts[:place]:
            if part.needs is None or other.name in part.needs:
                await self._tried[other.name].wait()
        while part.start_when is not None and not await part.start_when():  # noqa: ASYNC110  another process
            await asyncio.sleep(POLL_S)
        try:
            await keeper.start()
        except StartError as error:
            if not part.spare:
                raise
            self._report(part.name, State.DOWN, str(error))
        self._tried[part.name].set()
        await keeper.keep()

    async def _tell(self, started: Callable[[], None]) -> None:
        """Call `started` once every part has been started."""
        for tried in self._tried.values():
            await tried.wait()
        started()

    async def _empty_large_logs(self) -> None:
        """Keep logs from filling the disk."""
        for part in self._parts:
            await asyncio.to_thread(self._data.empty_log, part.name)


class _Keeper:
    """One part through all its runs."""

    def __init__(self, part: Part, data: DataFolder, report: Report, backoff: Backoff) -> None:
        self._part = part
        self._data = data
        self._report = report
        self._backoff = backoff
        self._process: GuardedProcess | None = None
        self._was_ready = False

    async def start(self) -> None:
        """Start a run and wait until it is ready.

        Raises:
            StartError: when it ended or took too long; nothing of it is left then.
        """
        self._report(self._part.name, State.STARTING, self._part.address)
        log, self._was_ready = self._data.log(self._part.name), False
        self._process = process = await GuardedProcess.start(self._part, log, keep_open=(self._data.lock,))
        try:
            async with asyncio.timeout(self._part.start_timeout_s):
                ready = await self._until_ready(process)
        except TimeoutError:
            ready = False
        if not ready:
            how = f"was not ready after {self._part.start_timeout_s:.0f} s"
            if not process.running:
                how = f"ended with status {await process.wait()} before it was ready"
            await process.kill()
            raise StartError(f"{self._part.name} {how}. The end of {log}:\n{process.log_tail()}")
        self._was_ready = True
        self._report(self._part.name, State.READY, f"{self._part.address} after {process.uptime_s:.1f} s")

    async def keep(self) -> None:
        """Start the part again whenever it ends, until cancelled, or until it has died too often.

        Raises:
            StartError: when it has, and the others cannot do without it.
        """
        deaths = 0
        while self._process is not None:
            code = await self._process.wait()
            after_s = self._process.uptime_s
            deaths = 1 if self._was_ready and after_s >= self._backoff.forgive_s else deaths + 1
            ended = f"ended with status {code} after {after_s:.0f} s"
            if deaths >= self._backoff.most:
                self._give_up(f"{ended}, {deaths} times in a row now")
                return
            delay_s = self._backoff.delay_s(deaths)
            self._report(self._part.name, State.DOWN, f"{ended}; starting it again in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            try:
                await self.start()
            except StartError as error:
                self._report(self._part.name, State.DOWN, str(error))

    def _give_up(self, ended: str) -> None:
        """Say that the part is not started again, or end everything if the others cannot do without it."""
        assert self._process
        tail = f"The end of {self._data.log(self._part.name)}:\n{self._process.log_tail()}"
        if not self._part.spare:
            raise StartError(f"{self._part.name} {ended}. {tail}")
        self._report(self._part.name, State.GIVEN_UP, f"{ended}; the others go on without it. {tail}")

    async def stop(self, hurry: asyncio.Event) -> None:
        """Give the part its time to finish; end it at once when `hurry` is set."""
        if self._process is None or not self._process.running:
            return
        self._report(self._part.name, State.STOPPING)
        stopping = asyncio.create_task(self._process.stop(self._part.stop_timeout_s))
        hurrying = asyncio.create_task(hurry.wait())
        await asyncio.wait((stopping, hurrying), return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        if not stopping.done():
            stopping.cancel()
            await self._process.kill()
        self._report(self._part.name, State.STOPPED)

    async def _until_ready(self, process: GuardedProcess) -> bool:
        """True when the part is ready, False when it ended first."""
        ended = asyncio.create_task(process.wait())
        try:
            while not ended.done():
                if await self._part.ready():
                    return True
                await asyncio.wait((ended,), timeout=POLL_S)
            return False
        finally:
            ended.cancel()
