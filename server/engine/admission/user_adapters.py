"""User adapters in the engine: fetched, verified and handed to every worker before a request is admitted.

Workers build a stacked adapter from a recipe's name inside `execute_model`, where nothing may fail. So what the name
needs is with them by then, and stays while the name is leased or in flight; beyond that only as far as it fits.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Set
from dataclasses import dataclass
from typing import Any, Protocol

from adapters.errors import UserAdapterError
from adapters.recipe import FusionRecipe, UserAdapterId
from adapters.user_adapter import decode_user_adapter
from bank.manifest import BankManifest
from server.errors import ApiError
from server.store.adapters import StoredAdapter

log = logging.getLogger("mta.engine")

SWEEP_S = 30.0
"""Time within which an engine drops what a user has not any more, requests that are not over aside."""


class AdapterSource(Protocol):
    """What is needed of `server.store.adapters.AdapterStore`."""

    async def adapter(self, adapter_id: UserAdapterId) -> StoredAdapter | None: ...

    async def adapter_id(self, user_key: str) -> str | None: ...


class Workers(Protocol):
    """The workers' side (`server.engine.fusing.extension`), called on all of them, one call after the other."""

    async def hold(self, name: str, raw: bytes) -> None: ...

    def release(self, names: list[str]) -> Coroutine[Any, Any, None]: ...


@dataclass(frozen=True, slots=True)
class _Held:
    """What the workers hold under a recipe's name."""

    adapter: UserAdapterId
    size_bytes: int


class UserAdapters:
    """Which user adapters the workers hold.

    Args:
        source: where adapters are kept.
        workers: who holds them.
        manifests: the engine's banks.
        max_rank: the largest rank a slot can hold.
        capacity_bytes: what workers may hold beyond what is in use.
        in_use: recipe names that must stay.
    """

    def __init__(
        self,
        source: AdapterSource,
        workers: Workers,
        manifests: Mapping[str, BankManifest],
        *,
        max_rank: int,
        capacity_bytes: int,
        in_use: Callable[[], Set[str]],
    ) -> None:
        self._source = source
        self._workers = workers
        self._manifests = manifests
        self._max_rank = max_rank
        self._capacity_bytes = capacity_bytes
        self._in_use = in_use
        self._held: OrderedDict[str, _Held] = OrderedDict()  # by recipe name, least recently used first
        self._sending: dict[str, asyncio.Task[bool]] = {}
        self._releasing: set[asyncio.Task[None]] = set()  # the loop itself keeps no task alive

    def __len__(self) -> int:
        return len(self._held)

    async def ensure(self, recipe: FusionRecipe) -> None:
        """Have the user adapter of a recipe with all workers.

        The store is asked every time, so that nothing is served that was replaced or erased. What is once on its way
        to the workers gets there though the client leaves, and is known from before: it can always be let go.

        Args:
            recipe: of this engine, with a user adapter, its name leased.

        Raises:
            UserAdapterError: when it is not there, damaged, or not for this recipe.
        """
        assert recipe.user_adapter is not None
        plain = f"the plain recipe is {recipe.plain.name}"
        while recipe.name in self._sending:  # for another request, whose failure or leaving is not this one's
            await asyncio.wait([self._sending[recipe.name]])
        try:
            if recipe.name in self._held:
                there = await self._is_current(recipe.user_adapter)
            else:
                self._sending[recipe.name] = asyncio.create_task(self._send(recipe, recipe.user_adapter))
                there = await asyncio.shield(self._sending[recipe.name])
        except ApiError as error:
            raise UserAdapterError(f"user adapter {recipe.user_adapter} cannot be fetched: {error}; {plain}") from error
        if not there:
            raise UserAdapterError(f"user adapter {recipe.user_adapter} is not there; {plain}")
        self._held.move_to_end(recipe.name)
        await self._make_room()

    async def sweep(self) -> None:
        """Let go of every adapter that its user has not any more and that no request uses; an engine does it often."""
        gone = [name for name, held in list(self._held.items()) if not await self._is_current(held.adapter)]
        in_use = self._in_use()
        await self._let_go([name for name in gone if name not in in_use])

    async def drop(self, user_key: str) -> int:
        """Let go of all adapters of a user that no request uses; how many are still held."""
        mine = [name for name, held in self._held.items() if held.adapter.user_key == user_key]
        in_use = self._in_use()
        await self._let_go([name for name in mine if name not in in_use])
        return sum(name in in_use for name in mine)

    async def _is_current(self, adapter: UserAdapterId) -> bool:
        """Whether an adapter is still the one that its user has."""
        return await self._source.adapter_id(adapter.user_key) == adapter.id

    async def _send(self, recipe: FusionRecipe, adapter: UserAdapterId) -> bool:
        """Fetch and verify an adapter and give it to all workers; whether it is there."""
        try:
            stored = await self._source.adapter(adapter)
            if stored is None:
                return False
            self._check(recipe, stored)
            self._held[recipe.name] = _Held(adapter, len(stored.raw))
            try:
                await self._workers.hold(recipe.name, stored.raw)
            except Exception:
                await self._let_go([recipe.name])  # some of them may have it
                raise
            return True
        finally:
            del self._sending[recipe.name]

    def _check(self, recipe: FusionRecipe, stored: StoredAdapter) -> None:
        """Whatever could go wrong in a worker goes wrong here."""
        if hashlib.sha256(stored.raw).hexdigest() != stored.sha256:
            raise UserAdapterError(f"user adapter {recipe.user_adapter} is damaged: its SHA-256 differs")
        manifest = self._manifests[recipe.bank]
        user = decode_user_adapter(manifest.layout, stored.raw)
        if user.recipe != recipe.plain.name:
            raise UserAdapterError(
                f"user adapter {recipe.user_adapter} was trained on {user.recipe}, not on {recipe.plain.name}"
            )
        fused = manifest.rank_of(recipe)
        if not user.added_rank and user.weights.rank != fused:
            raise UserAdapterError(f"user adapter {recipe.user_adapter} is for rank {user.weights.rank}, not {fused}")
        if fused + user.added_rank > self._max_rank:
            raise UserAdapterError(
                f"user adapter {recipe.user_adapter} adds rank {user.added_rank} to {fused}, "
                f"slots hold {self._max_rank}"
            )

    async def _make_room(self) -> None:
        surplus = sum(held.size_bytes for held in self._held.values()) - self._capacity_bytes
        if surplus <= 0:
            return
        in_use, chosen = self._in_use(), []
        for name, held in self._held.items():
            if surplus > 0 and name not in in_use:
                chosen.append(name)
                surplus -= held.size_bytes
        await self._let_go(chosen)

    async def _let_go(self, names: list[str]) -> None:
        """Have the workers forget adapters, whoever leaves meanwhile; calls reach them in the order they are made."""
        for name in names:
            self._held.pop(name, None)
        if names:
            releasing = asyncio.create_task(self._workers.release(names))
            self._releasing.add(releasing)
            releasing.add_done_callback(self._releasing.discard)
            await asyncio.shield(releasing)


class RpcWorkers:
    """`Workers` by vLLM's `collective_rpc`."""

    def __init__(self, rpc: Callable[..., Awaitable[object]]) -> None:
        self._rpc = rpc

    async def hold(self, name: str, raw: bytes) -> None:
        await self._rpc("mta_hold", args=(name, raw))

    async def release(self, names: list[str]) -> None:
        await self._rpc("mta_release", args=(names,))
