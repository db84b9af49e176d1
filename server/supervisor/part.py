"""What a part of `mta up` is, before it runs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

Probe = Callable[[], Awaitable[bool]]
"""Asks a part whether it can do its work now. False while it cannot yet; raises StartError when it never will."""


@dataclass(frozen=True, slots=True)
class Part:
    """One long-running process.

    Attributes:
        name: a short word for display; also the name of its log.
        command: program and arguments. Anyone on the machine can read it: no secret belongs here.
        environment: the complete environment, secrets included.
        ready: tells whether it can do its work.
        address: where it listens, for display.
        start_timeout_s: how long it may take to become ready.
        stop_timeout_s: how long it may take to finish what it is doing; after that it is killed.
        needs: of the parts beside it, those that must be ready before it starts; None for all that stand before it.
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


@dataclass(frozen=True, slots=True)
class Backoff:
    """How long to wait before a part that died is started again: doubling, up to a limit.

    Attributes:
        first_s: the wait after the first death.
        limit_s: the longest wait.
        forgive_s: a part that stayed up this long starts again with the shortest wait.
        most: a part that has died so often in a row is not started again.
    """

    first_s: float = 0.5
    limit_s: float = 30.0
    forgive_s: float = 60.0
    most: int = 10

    def delay_s(self, deaths: int) -> float:
        """The wait after the `deaths`-th death in a row, counted from 1."""
        return float(min(self.limit_s, self.first_s * 2 ** min(deaths - 1, 32)))
