"""The write side of profiles: how a history of items changes, and its embedding with it, each change one atomic step.

Repeating a change changes nothing: an item that is there with the same content keeps its place, and a full history
loses older items than those just given.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace

import numpy as np
import orjson

from bank.items.profile import Item, Vectors, item_text, profile_embedding
from bank.items.tasks import Task
from bank.lookup.embedder import Embedder
from server.errors import Unavailable, UserErased
from server.store.profile_record import OtherEmbedding, Profile, StoredItem, StoredVector, as_stored
from server.store.profiles import Change, ProfileStore, Snapshot
from server.store.queue import UserQueue
from server.store.tenants.user_key import User

log = logging.getLogger("mta.gateway")

EMBED_BATCH = 16  # texts per turn on an embedding thread: a long history does not keep a short one waiting
MAX_ATTEMPTS = 64
_MAX_PAUSE_S = 0.05

StoredItems = Mapping[str, StoredItem]  # by id, oldest first


@dataclass(frozen=True, slots=True)
class HistoryLimit:
    """The newest items within both limits are kept; `size_bytes` counts all of them, as JSON of their fields."""

    items: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class HistoryDiff:
    """What turns one history into another."""

    put: dict[str, StoredItem]  # to write: new, replaced or moved
    drop: tuple[str, ...]  # ids to remove
    changed: int  # how many were added, removed, or have new content; a move alone does not count


@dataclass(frozen=True, slots=True)
class ProfileUpdate:
    """The profile after a change, and how many items were added, removed, or have new content."""

    profile: Profile
    changed: int


@dataclass
class Profiles:
    """Changes and reads profiles."""

    store: ProfileStore
    embedder: Embedder
    task: Task
    executor: Executor  # the embedder's threads
    limit: HistoryLimit
    signing: UserQueue | None = None  # gets users whose items have changed; None where the bank has no signatures
    _refreshing: dict[str, asyncio.Task[Profile | None]] = field(default_factory=dict)

    async def current(self, user: User) -> Profile | None:
        """The profile with an embedding by the current embedder; None for an unknown user."""
        profile = await self.store.load(user.key)
        if profile is None:
            return None
        return profile.with_embedder(self.embedder.id) or await self._refreshed(user)

    async def replace(self, user: User, items: Sequence[Item], epoch: str) -> ProfileUpdate:
        """Replace the history with these items, oldest first; `epoch` is the user's when the request was accepted.

        Raises UserErased when the user is erased before the change is written; then nothing is written.
        """
        return await self._change(user, lambda history: replaced(history, items, self.limit), epoch)

    async def add(self, user: User, items: Sequence[Item], epoch: str) -> ProfileUpdate:
        """Add items to the history; an item whose id is there is replaced. Otherwise as `replace`."""
        return await self._change(user, lambda history: added(history, items, self.limit), epoch)

    async def items(self, user: User) -> Mapping[str, StoredItem]:
        """A user's history by item id, oldest first; empty for an unknown user."""
        return await self.store.items(user.key)

    async def want_signature(self, user: User) -> None:
        """Request a user's signature; does nothing if it has already been requested."""
        if self.signing is not None:
            await self.signing.add(user.key)

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
        except UserErased:
            return None

    async def _change(
        self, user: User, apply: Callable[[StoredItems], StoredItems], epoch: str | None = None
    ) -> ProfileUpdate:
        """Read, apply, embed what has no embedding yet, and commit; start over after a lost race."""
        key = user.key
        made: dict[tuple[str, str], Vectors] = {}  # by id and text: survives a lost race
        for attempt in range(MAX_ATTEMPTS):
            snapshot = await self.store.read(key)
            epoch = snapshot.epoch if epoch is None else epoch
            history = apply(snapshot.items)
            if not history:  # nothing to make an embedding from
                raise UserErased
            step = difference(snapshot.items, history)
            same = not step.put and not step.drop
            seen = snapshot.profile and snapshot.profile.with_embedder(self.embedder.id)
            if seen and same:
                await self.store.wait_until_durable(key)
                return ProfileUpdate(seen, 0)
            vectors, fresh = await self._vectors(snapshot, history, made)
            embedding = as_stored(profile_embedding(np.stack(list(vectors.values()))))
            profile = Profile(user.id, len(history), 0, self.embedder.id, embedding)
            profile = _following(snapshot.profile, profile, same_items=same)
            change = Change(profile, step.put, fresh, step.drop)
            if await self.store.commit(key, snapshot.version, change, epoch):
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
        texts = {name: item_text(Item(name, item.fields), self.task) for name, item in history.items()}
        kept = {
            name: stored.vector
            for name, stored in snapshot.vectors.items()
            if stored.embedder == self.embedder.id
            and (before := snapshot.items.get(name))
            and (after := history.get(name))
            and before.fields == after.fields
        }
        lacking = [(name, text) for name, text in texts.items() if name not in kept]
        unmade = [pair for pair in lacking if pair not in made]
        for start in range(0, len(unmade), EMBED_BATCH):
            batch = unmade[start : start + EMBED_BATCH]
            rows = await asyncio.get_running_loop().run_in_executor(
                self.executor, self.embedder.embed, [text for _, text in batch]
            )
            made.update(zip(batch, map(as_stored, rows), strict=True))
        vectors = {name: kept[name] if name in kept else made[name, text] for name, text in texts.items()}
        return vectors, {name: StoredVector(self.embedder.id, made[name, text]) for name, text in lacking}


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


def replaced(current: StoredItems, given: Sequence[Item], limit: HistoryLimit) -> dict[str, StoredItem]:
    """The given items alone, the newest within the limit, in the order given."""
    fresh = _newest(_distinct(given), limit)
    if list(fresh) == list(current):  # the same items in the same order: their places stay as they are
        return {name: StoredItem(current[name].order, fields) for name, fields in fresh.items()}
    return {name: StoredItem(order, fields) for order, (name, fields) in enumerate(fresh.items())}


def added(current: StoredItems, given: Sequence[Item], limit: HistoryLimit) -> dict[str, StoredItem]:
    """The history with the given items added; beyond the limit, the oldest that were not given go first."""
    distinct = _distinct(given)
    untouched = {name: item.fields for name, item in current.items() if name not in distinct}
    kept = _newest(untouched | distinct, limit)
    merged = {name: StoredItem(item.order, kept[name]) for name, item in current.items() if name in kept}
    order = max((item.order for item in current.values()), default=-1) + 1
    new = [name for name in kept if name not in merged]
    return merged | {name: StoredItem(order, kept[name]) for order, name in enumerate(new, order)}


def difference(before: StoredItems, after: StoredItems) -> HistoryDiff:
    put = {name: item for name, item in after.items() if before.get(name) != item}
    drop = tuple(name for name in before if name not in after)
    moved = sum(name in before and before[name].fields == item.fields for name, item in put.items())
    return HistoryDiff(put, drop, len(put) - moved + len(drop))


def _distinct(given: Sequence[Item]) -> dict[str, Mapping[str, str]]:
    """Fields by id; of items with the same id the last one counts, at its place."""
    distinct: dict[str, Mapping[str, str]] = {}
    for item in given:
        distinct.pop(item.id, None)
        distinct[item.id] = item.fields
    return distinct


def _newest(items: Mapping[str, Mapping[str, str]], limit: HistoryLimit) -> dict[str, Mapping[str, str]]:
    kept: list[str] = []
    room_bytes = limit.size_bytes
    for name in reversed(list(items)[-limit.items :]):
        room_bytes -= len(orjson.dumps(dict(items[name])))
        if room_bytes < 0:
            break
        kept.append(name)
    return {name: items[name] for name in reversed(kept)}
