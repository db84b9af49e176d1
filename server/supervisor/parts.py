"""What a part of `mta up` is before it runs, and how to tell that it is ready: by what its own clients would ask."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from adapters.errors import MtaError
from server.engine_protocol import key_header

PROBE_TIMEOUT_S = 5.0
RUN = b"==== mta up starts "
"""Starts the line in a log that marks the beginning of a run."""

Probe = Callable[[], Awaitable[bool]]


class StartError(MtaError):
    """Something that `mta up` needs is taken, missing, or did not become ready; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Part:
    """One long-running process.

    Attributes:
        name: a short word for display; also the name of its log.
        command: program and arguments. Anyone on the machine can read it: no secret belongs here.
        environment: the complete environment, secrets included.
        ready: tells whether it can do its work.
        address: where it listens, for display.
        stop_timeout_s: how long it may take to finish what it is doing; after that it is killed.
        needs: of the parts before it, those that must be ready before it starts; None for all.
        spare: whether the others serve without it, should it not start, or have died too often to be started again.
        niceness: above 0 it stands back behind the other parts where they want the same cores.
        start_when: asks another part whether it is far enough for this one to start.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    ready: Probe
    address: str
    start_timeout_s: float
    stop_timeout_s: float
    needs: tuple[str, ...] | None = None
    spare: bool = False
    niceness: int = 0
    start_when: Probe | None = None


def answers_http(url: str, key: str | None = None) -> Probe:
    """Ready when GET `url` answers 200; `key` is the engine's, where an engine is asked."""

    async def ready() -> bool:
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        try:
            async with aiohttp.request("GET", url, headers=key_header(key), timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError):
            return False

    return ready


def writes(log: Path, text: str) -> Probe:
    """Ready when the part has written `text` to its log since it was last started."""

    return lambda: asyncio.to_thread(lambda: log.exists() and text in newest_run(log.read_bytes()))


def newest_run(log: bytes) -> str:
    """The newest run's output, from a log or the end of one; all of it if the log was emptied since the run began."""
    _, begun, written = log.rpartition(RUN)
    return (written.partition(b"\n")[2] if begun else log).decode("utf-8", "replace")
