"""What an exercise needs of a fleet, however its parts are started."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import httpx

KINDS = ("gateway", "engine", "router", "worker", "valkey")


@dataclass(frozen=True, slots=True)
class Replacement:
    """One step of replacing a fleet's parts.

    Attributes:
        part: name of the part.
        how: what differs in the new one; empty if nothing does.
        replace: stops the part and starts the new one; returns once that is ready.
        closed_url: URL of a gateway to which a load balancer must send nothing meanwhile; empty if it need not know.
    """

    part: str
    how: str
    replace: Callable[[], object]
    closed_url: str = ""

    def __str__(self) -> str:
        return f"{self.part}, {self.how}" if self.how else self.part


class Parts(Protocol):
    """The running parts of a fleet."""

    @property
    def names(self) -> Sequence[str]:
        """Names of all parts: a kind of `KINDS`, and a number if there are several of it, such as `engine-2`."""

    @property
    def urls(self) -> Sequence[str]:
        """URLs of the gateways."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers of every request to a gateway."""

    def processes(self, name: str) -> list[int]:
        """Return the pids of a part's own process, which is first, and of all its descendants."""

    def kill(self, name: str) -> None:
        """Kill a part, and return once it has been started again; AssertionError if that takes too long."""


class ReplaceableParts(Parts, Protocol):
    """Parts that can be replaced by others one by one."""

    def replacements(self) -> Iterator[Replacement]:
        """Yield every step, in the order in which docs/ say that a new version or bank is rolled out."""


class RotatedParts(Protocol):
    """Parts with a secret of users' keys that can be exchanged."""

    @property
    def secret(self) -> str:
        """`MTA_SECRET` of the parts that run."""

    def with_secret(self, secret: str) -> Iterator[Replacement]:
        """Yield the steps that start all parts that need it again, with this `MTA_SECRET`."""

    def command(self, *words: str) -> str:
        """Run an `mta` command with the settings of the parts, and return its output."""


def kind_of(name: str) -> str:
    """Return the kind of a part, one of `KINDS`."""
    return name.partition("-")[0]


def is_whole(url: str, headers: Mapping[str, str] | None = None) -> bool:
    """Whether the gateway at this URL reports all parts as ready."""
    try:
        said = httpx.get(f"{url}/ready", headers=headers, timeout=10).json()
    except (httpx.HTTPError, ValueError):
        return False
    return bool(said["status"] == "ready" and said["detail"] is None)


def all_whole(parts: Parts) -> bool:
    """Whether every gateway reports all parts as ready."""
    return all(is_whole(url, parts.headers) for url in parts.urls)
