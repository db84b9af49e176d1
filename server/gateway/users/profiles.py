"""The write side of profiles: from items to an embedding, each change one atomic step."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from bank.items.profile import Item, Vectors, item_text, profile_embedding
from bank.items.tasks import Task
from server.errors import Unavailable, UserErased
from server.gateway.users.history import HistoryLimit, StoredItems, added, difference, replaced
from server.store.profile_record import OtherEmbedding, Profile, StoredItem, StoredVector, as_stored
from server.store.profiles import Change, ProfileStore, Snapshot
from server.store.queue import UserQueue
from server.store.tenants.user_key import User

log = logging.getLogger("mta.gateway")

EMBED_BATCH = 16
"""Texts per turn on an embedding thread: a long history does not keep a short one waiting."""

MAX_ATTEMPTS = 64
_MAX_PAUSE_S = 0.05


class TextEmbedder(Protocol):
    """What is used of `bank.lookup.embedder.Embedder`."""

    id: str

    def embed(self, texts: Sequence[str]) -> Vectors: ...


@dataclass(frozen=True, slots=True)
class ProfileUpdate:
    """The profile after a change, and how many items were added, removed, or have new content."""

    profile: Profile
    changed: int


class Profiles:
    """Changes and reads profiles.

    Args:
        executor: the embedder's threads.
        signing: gets users whose items have changed; None where the bank has no signatures.
    """

    def __init__(
        self,
        store: ProfileStore,
        *,
        embedder: TextEmbedder,
        task: Task,
        executor: Executor,
        limit: HistoryLimit,
        signing: UserQueue | None = None,
    ) -> None:
        self._store = store
        self._embedder = embedder
        self._task = task
        self._executor = executor
        self._limit = limit
        self._signing = signing
        self._refreshing: dict[str, asyncio.Task[Profile | None]] = {}

    async def current(self, user: User) -> Profile | None:
        """The profile with an embedding by the current embedder; None for an unknown user."""
        profile = await self._store.load(user.key)
        if profile is None:
            return None
        return profile.seen_by(self._embedder.id) or await self._refreshed(user)

    async def owner(self, key: str) -> str | None:
        """The id of the user that a key stands for; None where nothing is stored under it."""
        profile = await self._store.load(key)
        return profile.user_id if profile else None

    async def epoch(self, user: User) -> str:
        """The user's epoch, which a request that writes reads when it is accepted."""
        return await self._store.epoch(user.key)

    async def replace(self, user: User, items: Sequence[Item], epoch: str) -> ProfileUpdate:
        """Replace the history with these items, oldest first; `epoch` is the user's when the request was accepted.

        Raises:
            UserErased: when the user is erased before the change is written; then nothing is written.
        """
        return await self._change(user, lambda history: replaced(history, items, self._limit), epoch)

    async def add(self, user: User, items: Sequence[Item], epoch: str) -> ProfileUpdate:
        """Add items to the history; an item whose id is there is replaced. Otherwise as `replace`."""
        return await self._change(user, lambda history: added(history, items, self._limit), epoch)

    async def items(self, user: User) -> Mapping[str, StoredItem]:
        """A user's history by item id, oldest first; empty for an unknown user."""
        return await self._store.items(user.key)

    async def want_signature(self, user: User) -> None:
        """Request a user's signature; does nothing if it has already been requested."""
        if self._signing is not None:
            await self._signing.request(user.key)

    async def stored_bytes(self, user: User) -> int:
        """Memory of profile, items and vectors in the store."""
        return await self._store.stored_bytes(user.key)

    async def _refreshed(self, user: User) -> Profile | None:
        """Remake another embedder's embedding; concurrent requests wait for the same work."""
        task = self._refreshing.get(user.key)
        if task is None:
            task = self._refreshing[user.key] = asyncio.create_task(self._refresh(user))
            task.add_done_callback(lambda _: self._refreshing.pop(user.key, None))
        return await asyncio.shield(task)

    async def _refresh(self, user: User) -> Profile | None:
        try:
            return (await self._change(user, dict)).profile
        except (_NoItems, UserErased):
            return None

    async def _change(
        self, user: User, apply: Callable[[StoredItems], StoredItems], epoch: str | None = None
    ) -> ProfileUpdate:
        """Read, apply, embed what has no embedding yet, and commit; start over after a lost race."""
        key = user.key
        made: dict[tuple[str, str], Vectors] = {}  # by id and text: survives a lost race
        for attempt in range(MAX_ATTEMPTS):
            snapshot = await self._store.read(key)
            epoch = snapshot.epoch if epoch is None else epoch
            history = apply(snapshot.items)
            if not history:
                raise _NoItems
            step = difference(snapshot.items, history)
            seen = snapshot.profile and snapshot.profile.seen_by(self._embedder.id)
            if seen and not step.put and not step.drop:
                await self._store.settle(key)
                return ProfileUpdate(seen, 0)
            vectors, fresh = await self._vectors(snapshot, history, made)
            embedding = as_stored(profile_embedding(np.stack(list(vectors.values()))))
            profile = Profile(user.id, len(history), 0, self._embedder.id, embedding)
            profile = _following(snapshot.profile, profile, same_items=not step.put and not step.drop)
            change = Change(profile, step.put, fresh, step.drop)
            if await self._store.commit(key, snapshot.version, change, epoch):
                try:
                    await self.want_signature(user)
                except Unavailable as error:  # no write fails for that: the next answer without a signature requests it
                    log.warning("a signature could not be requested: %s", error.explained)
                return ProfileUpdate(profile, step.changed)
            await asyncio.sleep(random.uniform(0, min(_MAX_PAUSE_S, 0.001 * 2**attempt)))
        raise Unavailable(
            f"too many other requests are changing this profile: gave up after {MAX_ATTEMPTS} attempts",
            code="contention",
        )

    async def _vectors(
        self, snapshot: Snapshot, history: StoredItems, made: dict[tuple[str, str], Vectors]
    ) -> tuple[dict[str, Vectors], dict[str, StoredVector]]:
        """The embedding of every item [E], and those of them that the store lacks."""
        texts = {name: item_text(Item(name, item.fields), self._task) for name, item in history.items()}
        kept = {
            name: stored.vector
            for name, stored in snapshot.vectors.items()
            if stored.embedder == self._embedder.id and _same_content(snapshot.items.get(name), history.get(name))
        }
        lacking = [(name, text) for name, text in texts.items() if name not in kept]
        unmade = [pair for pair in lacking if pair not in made]
        for start in range(0, len(unmade), EMBED_BATCH):
            batch = unmade[start : start + EMBED_BATCH]
            rows = await asyncio.get_running_loop().run_in_executor(
                self._executor, self._embedder.embed, [text for _, text in batch]
            )
            made.update(zip(batch, map(as_stored, rows), strict=True))
        vectors = {name: kept[name] if name in kept else made[name, text] for name, text in texts.items()}
        return vectors, {name: StoredVector(self._embedder.id, made[name, text]) for name, text in lacking}


class _NoItems(Exception):
    """There is nothing to make an embedding from."""


def _same_content(before: StoredItem | None, after: StoredItem | None) -> bool:
    return before is not None and after is not None and before.fields == after.fields


def _following(before: Profile | None, profile: Profile, *, same_items: bool) -> Profile:
    """The record that replaces another: all but the items stays, also an embedding of the same items by another."""
    now_ms = time.time_ns() // 1_000_000
    if before is None:
        return replace(profile, updated_ms=now_ms)
    kept = replace(profile, adapter=before.adapter, signature=before.signature, extra=before.extra)
    if not same_items:
        return replace(kept, updated_ms=max(now_ms, before.updated_ms + 1))
    other = OtherEmbedding(before.embedder, before.embedding, before.updated_ms)
    return replace(kept, updated_ms=before.updated_ms, other=other)
