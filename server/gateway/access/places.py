"""How many sequences this gateway may have in the engines at once: its share of what they compute in a batch."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from hashlib import blake2b
from math import ceil

from server.errors import Unavailable
from server.store.tenants.rates import Rates

LOOK_S = 2.0
_LEASE_S = 10.0


class SharedPlaces:
    """Shares the engines' places out evenly among the gateways that use them, and one store.

    Args:
        sequences: says how many the engines compute at once; None while nobody knows.
        given: the share, if the settings say it.
    """

    def __init__(
        self, store: Rates, urls: Sequence[str], sequences: Callable[[], int | None], given: int | None
    ) -> None:
        self._store = store
        self._sequences = sequences
        self._given = given
        self._gateways = 1
        self._name = secrets.token_hex(8)
        self._all = f"gateways/{blake2b(' '.join(sorted(urls)).encode(), digest_size=8).hexdigest()}"

    def __call__(self) -> int | None:
        """The share, at least 1; None while no engine has said anything."""
        if self._given is not None or (sequences := self._sequences()) is None:
            return self._given
        return ceil(sequences / self._gateways)

    async def look(self) -> None:
        """Be counted, and count the others, every `LOOK_S`; while the store is away their last number stays."""
        self._gateways = await self._store.hold(self._all, [self._name], _LEASE_S) or 1

    async def leave(self) -> None:
        """Leave this share to the others at once; a store that cannot be told forgets it in a few seconds."""
        with suppress(Unavailable):
            await self._store.let_go(self._all, self._name)
