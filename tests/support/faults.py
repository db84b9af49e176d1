"""A connection to the store that fails as networks and processes do, where a test says so."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from server.errors import Unavailable
from server.store.redis.servers.connection import RedisConnection


class Fault(StrEnum):
    """What befalls one write."""

    LOST_REQUEST = "the request never arrives"
    LOST_ANSWER = "it is done, but nobody hears of it"
    TWICE = "the answer is lost, and the client sends it again"


class FaultyConnection(RedisConnection):
    """Fails at the n-th write after `fail`; for the caller that is also what its own death there looks like."""

    _fault: Fault | None = None
    _left = 0

    def fail(self, fault: Fault | None, after_writes: int = 0) -> None:
        self._fault, self._left = fault, after_writes

    async def write(self, script: str, names: Sequence[str], *arguments: Any) -> Any:
        fault = self._fault if self._left == 0 else None
        self._left -= 1
        if fault is None:
            return await super().write(script, names, *arguments)
        self._fault = None
        if fault is Fault.LOST_REQUEST:
            raise Unavailable("lost on its way to the store")
        await super().write(script, names, *arguments)
        if fault is Fault.LOST_ANSWER:
            raise Unavailable("lost on its way from the store")
        return await super().write(script, names, *arguments)
