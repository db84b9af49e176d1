"""The sliding windows of the library `limits`, over the stores' own client of Redis, be it a cluster's or not."""

from __future__ import annotations

from typing import Any

from limits import RateLimitItem, RateLimitItemPerSecond
from limits.aio.storage import RedisStorage
from limits.aio.strategies import SlidingWindowCounterRateLimiter

from server.store.redis import keys
from server.store.tenants.rates import Rate


class Windows:
    """What is used within each rate's window. A command each; the client's errors pass through."""

    def __init__(self, client: Any) -> None:
        self._limiter = SlidingWindowCounterRateLimiter(_Storage(client))

    async def take(self, rate: Rate, amount: int) -> bool:
        """See `Rates.take`."""
        return await self._limiter.hit(_item(rate), rate.owner, cost=amount)

    async def left(self, rate: Rate) -> tuple[float, float]:
        """How much is left, and the Unix time when there will be more."""
        stats = await self._limiter.get_window_stats(_item(rate), rate.owner)
        return stats.remaining, stats.reset_time


class _Storage(RedisStorage):
    """The library's, without a connection of its own."""

    STORAGE_SCHEME = None  # type: ignore[assignment]  # not one that the library finds by a URL

    def __init__(self, client: Any) -> None:
        self._client = client
        super().__init__("redis://", implementation="redispy", key_prefix=keys.RATES)

    def configure_bridge(self) -> None:
        self.bridge.storage = self._client  # type: ignore[attr-defined]
        self.bridge.connection_getter = lambda readonly: self._client  # type: ignore[attr-defined]


def _item(rate: Rate) -> RateLimitItem:
    return RateLimitItemPerSecond(rate.most, rate.window_s, namespace=rate.what)
