"""Change users' item histories and the embeddings made from them; each change is atomic.

Changes are idempotent: an item that is stored with the same content keeps its position, and a full history drops older
items before the new ones.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal
from weakref import WeakValueDictionary

import numpy as np
import orjson

from adapters.errors import excerpt
from bank.items.profile import Item, Vectors, item_text, profile_embedding
from bank.items.tasks import Task
from bank.lookup.embedder import Embedder
from bank.lookup.signature import Signature
from server.errors import ApiError, InvalidRequest, Unavailable, UserErased
from server.gateway.access.quotas import Quotas
from server.gateway.access.shares import FairQueue
from server.gateway.users.passing import MEAN, Passing
from server.settings import MAX_ITEM_BYTES
from server.store.profile_record import (
    OtherEmbedding,
    Profile,
    StoredItem,
    StoredSignature,
    StoredVector,
    as_stored,
    encode_item,
)
from server.store.profiles import Change, ProfileStore, Snapshot
from server.store.queue import UserQueue
from server.store.rotation import Rotation
from server.store.tenants.holdings import Held
from server.store.tenants.user_key import User

log = logging.getLogger("mta.gateway")

CHANGES_AT_ONCE = 32  # in a gateway, each of up to 10 MB
EMBED_BATCH = 16  # texts per executor task, so that short histories need not wait for long ones
MAX_ATTEMPTS = 64  # commits per change when other requests keep winning the race
MAX_REFRESHING = 16  # profiles that are embedded in the background; beyond, the next answer to a user tries again
SIGNED_AT = (4, 8, 16, 32)  # numbers of learnt items at which a signature is made; then the first of each day
_DAY_MS = 24 * 3600 * 1000
_MAX_PAUSE_S = 0.05  # longest pause between two attempts
_ITEM_BYTES = 1000  # of an item in the store besides its text: its embedding, and the hashes' own

StoredItems = Mapping[str, StoredItem]  # by id, oldest first
Kind = Literal["replace", "add", "learn", "embed"]  # of a change


@dataclass(frozen=True, slots=True)
class HistoryLimit:
    items: int
    size_bytes: int  # total size of all fields as JSON


@dataclass(frozen=True, slots=True)
class HistoryDiff:
    """The writes that turn one history into another."""

    put: StoredItems  # new, replaced and moved items
    drop: tuple[str, ...]  # ids of removed items
    changed: int  # number of items added or with new content; moved items do not count


@dataclass(frozen=True, slots=True)
class ProfileUpdate:
    profile: Profile  # after the change
    changed: int  # as in `HistoryDiff`
    removed: int  # number of older items that had to go


@dataclass
class Profiles:
    rotation: Rotation  # finds users while there are two secrets
    embedder: Embedder
    task: Task
    executor: Executor  # the embedder's threads
    turns: FairQueue  # for them, in which each tenant has one at a time
    places: FairQueue  # for changes, of which each holds a whole history
    limit: HistoryLimit
    quotas: Quotas
    keep_texts: bool = True  # unless an API key says otherwise
    signing: UserQueue | None = None  # users with changed items; None if the bank has no signatures
    no_evidence: Signature | None = None  # an empty signature for this bank, likewise
    _refreshing: dict[str, asyncio.Task[Profile | None]] = field(default_factory=dict)
    _long: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)  # by tenant

    @property
    def store(self) -> ProfileStore:
        return self.rotation.profiles

    async def find(self, user: User) -> tuple[User, Profile | None, str]:
        """Return the user as stored, the profile if there is one, embedded by this embedder or 0, and the epoch."""
        user, profile, epoch = await self.find_at_once(user)
        if profile and profile.embedder != self.embedder.id:
            if not profile.keeps_texts:
                return user, replace(profile, embedding=np.zeros(self.embedder.dim, np.float32)), epoch
            profile = await asyncio.shield(self._refresh_once(user))
        return user, profile, epoch

    async def find_at_once(self, user: User) -> tuple[User, Profile | None, str]:
        """Return what `find` does, but have a profile with another embedder's embedding embedded in the background."""
        user, profile, epoch = await self.store.find(user)
        current = profile and profile.with_embedder(self.embedder.id)
        if profile and not current and profile.keeps_texts and len(self._refreshing) < MAX_REFRESHING:
            self._refresh_once(user)
        return user, current or profile, epoch

    def is_forgotten(self, profile: Profile) -> bool:
        """Return whether what texts that are not kept have left is of another embedder or bank."""
        return profile.is_forgotten(self.embedder.id, self.no_evidence.bank if self.no_evidence else None)

    def keeps_texts(self, before: Profile | None, keep: bool | None) -> bool:
        """Return whether a user's texts stay if the API key says `keep`; if they do not, this holds until a PUT."""
        return (self.keep_texts if keep is None else keep) and (before is None or before.keeps_texts)

    async def replace(self, user: User, items: Sequence[Item], epoch: str, keep: bool | None = None) -> ProfileUpdate:
        """Replace the history with these items, oldest first; `epoch` is the user's epoch at the time of the request.

        `keep` is the API key's `Policy.keep_texts`. Raises UserErased, and writes nothing, if the user is erased before
        the change is written.
        """
        return await self._change(user, "replace", items, epoch, keep)

    async def add(self, user: User, items: Sequence[Item], epoch: str, keep: bool | None = None) -> ProfileUpdate:
        """Add items to the history, replacing items with the same id. Otherwise like `replace`."""
        return await self._change(user, "add", items, epoch, keep)

    async def learn(self, user: User, item: Item, epoch: str, keep: bool | None = None) -> ProfileUpdate:
        """Add an item that was seen in passing. A signature is made at `SIGNED_AT` items and then daily.

        Each signature gives a new recipe, which finds no prefix in the engines' caches. Texts that are not kept cannot
        wait: they are signed at once. Otherwise like `replace`.
        """
        return await self._change(user, "learn", [item], epoch, keep)

    async def request_signature(self, user: User) -> None:
        """Request a user's signature unless it is requested already; after a failure, the next answer tries again."""
        try:
            if self.signing is not None:
                await self.signing.add(user.key, tenant=user.tenant)
        except ApiError as error:
            log.warning("a signature could not be requested: %s", error.explained)

    def _refresh_once(self, user: User) -> asyncio.Task[Profile | None]:
        """Replace another embedder's embedding; concurrent calls share one task per user."""
        task = self._refreshing.get(user.key)
        if task is None:
            task = self._refreshing[user.key] = asyncio.create_task(self._refresh(user))
            task.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieved without a waiter
        return task

    async def _refresh(self, user: User) -> Profile | None:
        try:
            return (await self._change(user, "embed")).profile
        except UserErased:
            return None
        except Exception as error:
            log.warning("a profile was not embedded again: %s", getattr(error, "explained", repr(error)))
            raise
        finally:
            del self._refreshing[user.key]

    async def _change(
        self, user: User, kind: Kind, items: Sequence[Item] = (), epoch: str | None = None, keep: bool | None = True
    ) -> ProfileUpdate:
        line: asyncio.Lock | nullcontext[None] = nullcontext()
        if len(items) > EMBED_BATCH:  # a tenant's follow each other: else the first of many is done as late as the last
            line = self._long.setdefault(user.tenant, asyncio.Lock())
        async with line, self.places.held(user.tenant):
            return await self.rotation.at(user, lambda user: self._change_at(user, kind, items, epoch, keep))

    async def _change_at(
        self, user: User, kind: Kind, items: Sequence[Item], epoch: str | None, keep: bool | None
    ) -> ProfileUpdate:
        """Read, apply, embed new items, and commit; start over if another request commits first."""
        key = user.key
        embedded: dict[tuple[str, str], Vectors] = {}  # by id and text; reused when an attempt starts over
        with ExitStack() as admitted:
            for attempt in range(MAX_ATTEMPTS):
                snapshot = await self.store.read(key)
                epoch = snapshot.epoch if epoch is None else epoch
                before, history = snapshot.profile, snapshot.items
                if kind != "embed":
                    make = replace_history if kind == "replace" else add_to_history
                    history = make(snapshot.items, items, self.limit)
                if not history:  # nothing to make an embedding from
                    raise UserErased
                passing, step = None, diff_histories(snapshot.items, history)
                if not self.keeps_texts(None if kind == "replace" else before, keep):
                    is_ours = before is not None and not before.keeps_texts and not self.is_forgotten(before)
                    passing = Passing.of(
                        snapshot, history, self.limit.items, is_ours=is_ours, replaces=kind == "replace"
                    )
                    history = passing.texts if self.signing else {}
                    step = HistoryDiff(passing.put if self.signing else {}, passing.drop, len(passing.new))
                elif before and not before.keeps_texts:
                    step = replace(step, drop=(*step.drop, *snapshot.vectors))
                same = not (step.put or step.drop or step.changed)
                current = before and before.with_embedder(self.embedder.id)
                if current and same:
                    await self.store.wait_until_durable(key)
                    return ProfileUpdate(current, 0, 0)
                if attempt == 0 and not same:
                    admitted.enter_context(self.quotas.admit(user, partial(_growth, snapshot, history)))
                embeds = passing.new if passing else history
                vectors, fresh = await self._vectors(user.tenant, snapshot, embeds, embedded)
                rows, count = list(vectors.values()), len(history)
                if passing:
                    fresh = passing.vectors(snapshot, self.embedder.id, rows)
                    rows, count = [fresh[MEAN].vector], len(passing.hashes)
                embedding = as_stored(profile_embedding(np.stack(rows)))
                profile = Profile(user.id, count, 0, self.embedder.id, embedding, keeps_texts=not passing)
                profile = _carry_over(before, profile, same_items=same)
                if passing:
                    profile = replace(profile, signature=profile.signature if passing.counted else None, phrases=b"")
                none = self.no_evidence
                put_off = kind == "learn" and not passing and none and not signature_due(before, profile, none.bank)
                if put_off and none:
                    profile = replace(profile, signature=StoredSignature(profile.evidence or none, profile.updated_ms))
                change = Change(profile, step.put, fresh, step.drop)
                if await self.store.commit(key, snapshot.version, change, epoch):
                    if not put_off:
                        await self.request_signature(user)
                    return ProfileUpdate(profile, step.changed, passing.removed if passing else len(step.drop))
                await asyncio.sleep(random.uniform(0, min(_MAX_PAUSE_S, 0.001 * 2**attempt)))
        raise Unavailable(
            f"too many other requests are changing this profile: gave up after {MAX_ATTEMPTS} attempts",
            code="contention",
        )

    async def _vectors(
        self, tenant: str, snapshot: Snapshot, history: StoredItems, embedded: dict[tuple[str, str], Vectors]
    ) -> tuple[dict[str, Vectors], dict[str, StoredVector]]:
        """Return the embedding of every item [E], and those embeddings that are not stored yet."""
        texts = {name: item_text(Item(name, item.fields), self.task) for name, item in history.items()}
        kept = {
            name: stored.vector
            for name, stored in snapshot.vectors.items()
            if stored.embedder == self.embedder.id
            and (before := snapshot.items.get(name))
            and (after := history.get(name))
            and before.fields == after.fields
        }
        missing = [(name, text) for name, text in texts.items() if name not in kept]
        to_embed = [pair for pair in missing if pair not in embedded]
        for start in range(0, len(to_embed), EMBED_BATCH):
            batch = to_embed[start : start + EMBED_BATCH]
            async with self.turns.held(tenant):
                rows = await asyncio.get_running_loop().run_in_executor(
                    self.executor, self.embedder.embed, [text for _, text in batch]
                )
            embedded.update(zip(batch, map(as_stored, rows), strict=True))
        vectors = {name: kept[name] if name in kept else embedded[name, text] for name, text in texts.items()}
        return vectors, {name: StoredVector(self.embedder.id, embedded[name, text]) for name, text in missing}


def signature_due(before: Profile | None, after: Profile, bank: str) -> bool:
    """Return whether items that were seen in passing need a signature now, not with later ones."""
    if before and not before.is_signed(bank):
        return True
    had = before.items if before else 0
    if after.items <= SIGNED_AT[-1]:
        return any(had < count <= after.items for count in SIGNED_AT)
    return had <= SIGNED_AT[-1] or before is None or before.updated_ms // _DAY_MS < after.updated_ms // _DAY_MS


def _carry_over(before: Profile | None, profile: Profile, *, same_items: bool) -> Profile:
    """Copy adapter, signature, phrases and extra fields to the new record; for the same items, the other embedding."""
    now_ms = time.time_ns() // 1_000_000
    if before is None:
        return replace(profile, updated_ms=now_ms)
    kept = replace(
        profile, adapter=before.adapter, signature=before.signature, phrases=before.phrases, extra=before.extra
    )
    if not same_items:
        return replace(kept, updated_ms=max(now_ms, before.updated_ms + 1))
    other = OtherEmbedding(before.embedder, before.embedding, before.updated_ms)
    return replace(kept, updated_ms=before.updated_ms, other=other)


def replace_history(current: StoredItems, given: Sequence[Item], limit: HistoryLimit) -> dict[str, StoredItem]:
    """Return the newest given items within the limit, in the given order."""
    fresh = _newest(_distinct(given), limit)
    if list(fresh) == list(current):  # same items, same order: keep the stored positions
        return {name: StoredItem(current[name].order, fields) for name, fields in fresh.items()}
    return {name: StoredItem(order, fields) for order, (name, fields) in enumerate(fresh.items())}


def add_to_history(current: StoredItems, given: Sequence[Item], limit: HistoryLimit) -> dict[str, StoredItem]:
    """Return the history with the given items added; beyond the limit, drop older items before given ones."""
    distinct = _distinct(given)
    untouched = {name: item.fields for name, item in current.items() if name not in distinct}
    kept = _newest(untouched | distinct, limit)
    merged = {name: StoredItem(item.order, kept[name]) for name, item in current.items() if name in kept}
    order = max((item.order for item in current.values()), default=-1) + 1
    new = [name for name in kept if name not in merged]
    return merged | {name: StoredItem(order, kept[name]) for order, name in enumerate(new, order)}


def diff_histories(before: StoredItems, after: StoredItems) -> HistoryDiff:
    put = {name: item for name, item in after.items() if before.get(name) != item}
    drop = tuple(name for name in before if name not in after)
    moved = sum(name in before and before[name].fields == item.fields for name, item in put.items())
    return HistoryDiff(put, drop, len(put) - moved)


def _growth(snapshot: Snapshot, history: StoredItems) -> Held:
    """Return about what a change adds to the store; fewer than 0 bytes if it makes room."""
    before, after = (sum(len(encode_item(item)) for item in items.values()) for items in (snapshot.items, history))
    more_items = len(history) - len(snapshot.items)
    return Held(people=snapshot.profile is None, bytes=after - before + _ITEM_BYTES * more_items)


def check_size(param: str, raw: bytes, shown: object, *, named: str = "", code: str = "sample_too_large") -> None:
    """Raise InvalidRequest if an item or sample is too large as JSON; `named` is what the message calls `param`."""
    if len(raw) > MAX_ITEM_BYTES:
        message = f"{named or param} has {len(raw)} bytes as JSON, at most {MAX_ITEM_BYTES} are allowed"
        raise InvalidRequest(f"{message}: {excerpt(shown)}", param=param, code=code)


def newest_items(items: Sequence[Item], limit: HistoryLimit) -> list[Item]:
    """Return the last items within the limit, of those with the same id the last one."""
    return [Item(name, fields) for name, fields in _newest(_distinct(items), limit).items()]


def _distinct(given: Sequence[Item]) -> dict[str, Mapping[str, str]]:
    """Return fields by id; of items with the same id, keep the last one and its position."""
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
