"""How many sequences this gateway may have in the engines at once: its share of what they compute in a batch."""

from __future__ import annotations

import secrets
from contextlib import suppress
from hashlib import blake2b
from math import ceil

from server.errors import Unavailable
from server.gateway.engines.admin import Engines
from server.store.tenants.rates import Rates

LOOK_S = 2.0
_LEASE_S = 10.0


class SharedPlaces:
    """Shares the engines' places out evenly among the gateways that use them, and one store.

    Args:
        engines: say how many sequences they compute at once.
        store: knows the gateways that are there.
        given: the share, if the settings say it.
    """

    def __init__(self, engines: Engines, store: Rates, given: int | None) -> None:
        self._engines = engines
        self._store = store
        self._given = given
        self._gateways = 1
        self._name = secrets.token_hex(8)
        self._all = f"gateways/{blake2b(' '.join(sorted(engines.urls)).encode(), digest_size=8).hexdigest()}"

    def __call__(self) -> int | None:
        """The share, at least 1; None while no engine has said anything."""
        if self._given is not None or self._engines.sequences is None:
            return self._given
        return ceil(self._engines.sequences / self._gateways)

    async def look(self) -> None:
        """Be counted, and count the others; to be called every `LOOK_S`.

        Raises:
            Unavailable: when the store cannot say; then their last number stays.
        """
        self._gateways = await self._store.hold(self._all, [self._name], _LEASE_S) or 1

    async def leave(self) -> None:
        """Leave this share to the others at once; a store that cannot be told forgets it in a few seconds."""
        with suppress(Unavailable):
            await self._store.let_go(self._all, self._name)
