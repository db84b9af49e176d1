"""The worker's second loop: signatures, a second each, of users whose items have changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from bank.profile import Item, item_pair
from bank.serving import ServingBank
from bank.signature import MAX_ITEMS, Signature
from server.errors import ApiError, UserErased
from server.store.profiles import Change, ProfileStore, StoredSignature
from server.store.signing import SignQueue
from server.watching import forever

log = logging.getLogger("mta.worker")

WAIT_S = 5.0
SWEEP_S = 5.0
RETRY_S = 1.0
ATTEMPTS = 20


class Signs(Protocol):
    """What is needed of `server.adapt_worker.training.AdapterTrainer`."""

    def signature(self, pairs: Sequence[tuple[str, str]]) -> Signature: ...


class SigningLoop:
    """Makes one signature at a time.

    Args:
        name: tells the worker from others in the queue.
        queue: who wants one.
        profiles: where users are.
        bank: reads their items.
        signer: makes signatures.
        model: held while the base model is in use: training and signing take turns.
    """

    def __init__(
        self,
        name: str,
        queue: SignQueue,
        profiles: ProfileStore,
        bank: ServingBank,
        signer: Signs,
        *,
        model: asyncio.Lock,
    ) -> None:
        self._name = name
        self._queue = queue
        self._profiles = profiles
        self._bank = bank
        self._signer = signer
        self._model = model

    async def run(self) -> None:
        """Work until cancelled; an unreachable store is waited for."""
        sweeping = asyncio.create_task(forever(SWEEP_S, self._queue.overdue, log))
        try:
            while True:
                try:
                    await self.work_once(WAIT_S)
                except ApiError as error:
                    log.warning("%s", error.explained)
                    await asyncio.sleep(RETRY_S)
        finally:
            sweeping.cancel()

    async def work_once(self, wait_s: float) -> bool:
        """Wait for a user and make their signature; whether there was one."""
        user_key = await self._queue.take(self._name, wait_s)
        if user_key is None:
            return False
        async with self._model:
            await self._sign(user_key)
        await self._queue.done(user_key)
        profile = await self._profiles.load(user_key)
        if profile is not None and not profile.is_signed(self._bank.manifest.short):
            await self._queue.ask(user_key)  # they changed while the queue still held them
        return True

    async def _sign(self, user_key: str) -> None:
        for _ in range(ATTEMPTS):
            snapshot = await self._profiles.read(user_key)
            profile = snapshot.profile
            if profile is None or profile.is_signed(self._bank.manifest.short):
                return
            items = [Item(name, stored.fields) for name, stored in snapshot.items.items()]
            pairs = [pair for item in items if (pair := item_pair(item, self._bank.task)) is not None]
            made = await asyncio.to_thread(self._signer.signature, pairs[-MAX_ITEMS:])
            signed = replace(profile, signature=StoredSignature(made, profile.updated_ms))
            try:
                if await self._profiles.commit(user_key, snapshot.version, Change(signed, {}, {}, ()), snapshot.epoch):
                    log.info("%s: signed, %d items", user_key, len(pairs[-MAX_ITEMS:]))
                    return
            except UserErased:
                return
