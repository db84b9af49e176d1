"""The worker's second loop: signatures, about a second each, for users whose items have changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from adapters.errors import MtaError
from bank.items.profile import Item, item_pair
from bank.lookup.serving import ServingBank
from bank.lookup.signature import MAX_ITEMS, Signature, empty_signature
from server.errors import Unavailable, UserErased
from server.store.profile_record import StoredSignature
from server.store.profiles import Change, ProfileStore
from server.store.queue import UserQueue
from server.worker.metrics import WorkerMetrics
from server.worker.training_thread import STALL_S, Stalled

log = logging.getLogger("mta.worker")

RETRY_S = 1.0
ATTEMPTS = 20
MAX_TRIES = 3
"""How many workers may die over one user's items; after that they get an empty signature."""


class Signs(Protocol):
    """The part of `server.worker.training.AdapterTrainer` that is used here."""

    def signature(self, pairs: Sequence[tuple[str, str]]) -> Signature: ...


class SigningLoop:
    """Makes one signature at a time; `model_lock` is held meanwhile: training and signing take turns."""

    def __init__(
        self,
        queue: UserQueue,
        profiles: ProfileStore,
        bank: ServingBank,
        signer: Signs,
        *,
        model_lock: asyncio.Lock,
        metrics: WorkerMetrics | None = None,
    ) -> None:
        self._queue = queue
        self._profiles = profiles
        self._bank = bank
        self._signer = signer
        self._model_lock = model_lock
        self._metrics = metrics or WorkerMetrics()

    async def work_once(self, wait_s: float) -> bool:
        """Wait for a user and make their signature; returns whether there was one."""
        user_key = await self._queue.take(wait_s)
        if user_key is None:
            return False
        async with self._model_lock:
            await self._sign(user_key)
        await self._queue.done(user_key)
        profile = await self._profiles.load(user_key)
        if profile is not None and not profile.is_signed(self._bank.manifest.short):
            await self._queue.request(user_key)  # their items changed while the queue still held them
        return True

    async def _sign(self, user_key: str) -> None:
        """Sign a user's items, unless they are signed; waits for a store that is away, as part of the same try."""
        tries = await self._queue.begin(user_key)
        while True:
            try:
                return await self._write(user_key, tries)
            except UserErased:
                return
            except Unavailable as error:
                if error.code == "store_corrupt":
                    log.error("%s: cannot be signed: %s", user_key, error.explained)
                    return
                log.warning("%s", error.explained)
            await asyncio.sleep(RETRY_S)

    async def _write(self, user_key: str, tries: int) -> None:
        for _ in range(ATTEMPTS):
            snapshot = await self._profiles.read(user_key)
            profile = snapshot.profile
            if profile is None or profile.is_signed(self._bank.manifest.short):
                return
            items = [Item(name, stored.fields) for name, stored in snapshot.items.items()]
            pairs = [pair for item in items if (pair := item_pair(item, self._bank.task)) is not None][-MAX_ITEMS:]
            if tries > MAX_TRIES:
                log.error("%s: gets an empty signature: workers died over its items %d times", user_key, MAX_TRIES)
                made = self._empty
            else:
                made = await self._made(user_key, pairs)
            signed = replace(profile, signature=StoredSignature(made, profile.updated_ms))
            if await self._profiles.commit(user_key, snapshot.version, Change(signed, {}, {}, ()), snapshot.epoch):
                self._metrics.signatures.inc()
                log.info("%s: signed, %d items", user_key, len(pairs))
                return

    async def _made(self, user_key: str, pairs: Sequence[tuple[str, str]]) -> Signature:
        """The items' signature, an empty one where none can be made of them; Stalled when it never comes."""
        making = asyncio.create_task(asyncio.to_thread(self._signer.signature, pairs))
        await asyncio.wait({making}, timeout=STALL_S)
        if not making.done():
            raise Stalled(f"{user_key}: no signature within {STALL_S:g} s; this process cannot go on")
        try:
            made = making.result()
        except MtaError as error:
            log.warning("%s: no signature: %s", user_key, type(error.__cause__ or error).__name__)
            return self._empty
        if pairs and not made.tokens:
            log.warning("%s: no signature: the gradient is not finite", user_key)
        return made

    @property
    def _empty(self) -> Signature:
        return empty_signature(self._bank.manifest.short, len(self._bank.manifest.anchors))
