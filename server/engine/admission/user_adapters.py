"""Fetch user adapters, verify them and send them to every worker before a request is admitted.

Workers keep a user adapter while its recipe's name is leased or in flight, and after that while there is room.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field

from adapters.errors import UserAdapterError
from adapters.raw import read_user_adapter
from adapters.recipe import FusionRecipe, UserAdapterId
from bank.manifest import BankManifest
from server.errors import ApiError
from server.store.adapters import AdapterStore, StoredAdapter

log = logging.getLogger("vllm.mta")

SWEEP_S = 30.0  # interval at which adapters that were replaced or erased are dropped, unless a request uses them


@dataclass(eq=False)
class UserAdapters:
    store: AdapterStore
    rpc: Callable[..., Awaitable[object]]  # `collective_rpc` to all workers, which execute calls in order
    manifests: Mapping[str, BankManifest]
    max_rank: int  # maximum rank of a slot
    capacity_bytes: int  # maximum size of the adapters that workers hold, unless more are in use
    in_use: Callable[[], Set[str]]  # recipe names that must be kept
    # Adapters with their size in bytes, by recipe name, least recently used first.
    _held: OrderedDict[str, tuple[UserAdapterId, int]] = field(default_factory=OrderedDict)
    _sending: dict[str, asyncio.Task[bool]] = field(default_factory=dict)
    _releasing: set[asyncio.Future[object]] = field(default_factory=set)  # keeps references to running tasks

    def __len__(self) -> int:
        return len(self._held)

    async def ensure(self, recipe: FusionRecipe) -> None:
        """Ensure that all workers have the user adapter of a leased recipe.

        Query the store every time, so that no replaced or erased adapter is served. Once started, sending continues
        even if the client disconnects; the adapter is recorded before, so that it can always be released. Raise
        UserAdapterError if the adapter is missing, damaged, or not for this recipe.
        """
        assert recipe.user_adapter is not None
        plain = f"the plain recipe is {recipe.plain.name}"
        while recipe.name in self._sending:  # another request sends it; its failure must not fail this request
            await asyncio.wait([self._sending[recipe.name]])
        try:
            if recipe.name in self._held:
                exists = await self._is_current(recipe.user_adapter)
            else:
                sending = self._sending[recipe.name] = asyncio.create_task(self._send(recipe, recipe.user_adapter))
                sending.add_done_callback(lambda task: task.cancelled() or task.exception())  # its client may be gone
                exists = await asyncio.shield(sending)
        except ApiError as error:
            raise UserAdapterError(f"user adapter {recipe.user_adapter} cannot be fetched: {error}; {plain}") from error
        if not exists:
            raise UserAdapterError(f"user adapter {recipe.user_adapter} does not exist; {plain}")
        self._held.move_to_end(recipe.name)
        await self._evict()

    async def sweep(self) -> None:
        gone = [name for name, (adapter, _) in list(self._held.items()) if not await self._is_current(adapter)]
        in_use = self.in_use()
        await self._release([name for name in gone if name not in in_use])

    async def drop(self, user_key: str) -> int:
        """Release all adapters of a user that no request uses; return how many are still held."""
        mine = [name for name, (adapter, _) in self._held.items() if adapter.user_key == user_key]
        in_use = self.in_use()
        await self._release([name for name in mine if name not in in_use])
        return sum(name in in_use for name in mine)

    async def _is_current(self, adapter: UserAdapterId) -> bool:
        return await self.store.adapter_id(adapter.user_key) == adapter.id

    async def _send(self, recipe: FusionRecipe, adapter: UserAdapterId) -> bool:
        """Fetch and verify an adapter and send it to all workers; return False if the store does not have it."""
        try:
            stored = await self.store.adapter(adapter)
            if stored is None:
                return False
            self._held[recipe.name] = adapter, len(stored.raw)
            try:
                await asyncio.to_thread(self._check, recipe, stored)
            except BaseException:
                self._held.pop(recipe.name, None)
                raise
            if recipe.name not in self._held:  # released in the meantime
                return False
            try:
                await self.rpc("mta", args=("hold", recipe.name, stored.raw))
            except Exception:
                await self._release([recipe.name])  # some workers may have received it
                raise
            return True
        finally:
            del self._sending[recipe.name]

    def _check(self, recipe: FusionRecipe, stored: StoredAdapter) -> None:
        """Raise UserAdapterError for any fault that would fail in a worker; takes about 0.25 s for 40 MiB."""
        adapter = f"user adapter {recipe.user_adapter}"
        if hashlib.sha256(stored.raw).hexdigest() != stored.sha256:
            raise UserAdapterError(f"{adapter} is damaged: its SHA-256 differs")
        manifest = self.manifests[recipe.bank]
        trained_on, added, _ = read_user_adapter(manifest.layout, stored.raw)
        if trained_on != recipe.plain.name:
            raise UserAdapterError(f"{adapter} was trained on {trained_on}, not on {recipe.plain.name}")
        fused = manifest.rank_of(recipe)
        if fused + added > self.max_rank:
            raise UserAdapterError(f"{adapter} adds rank {added} to {fused}, but slots hold rank {self.max_rank}")

    async def _evict(self) -> None:
        surplus = sum(size for _, size in self._held.values()) - self.capacity_bytes
        if surplus <= 0:
            return
        in_use, chosen = self.in_use(), []
        for name, (_, size) in self._held.items():
            if surplus > 0 and name not in in_use:
                chosen.append(name)
                surplus -= size
        await self._release(chosen)

    async def _release(self, names: list[str]) -> None:
        """Make the workers release adapters, even if the caller is cancelled; workers get calls in order."""
        for name in names:
            self._held.pop(name, None)
        if names:
            releasing = asyncio.ensure_future(self.rpc("mta", args=("release", names)))
            self._releasing.add(releasing)
            releasing.add_done_callback(self._releasing.discard)
            await asyncio.shield(releasing)
