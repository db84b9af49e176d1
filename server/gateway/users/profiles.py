"""Change users' item histories and the embeddings made from them; each change is atomic.

`Profiles._change_at` shows the steps of a change: plan what to write, embed, make the record, commit.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Literal
from weakref import WeakValueDictionary

import numpy as np

from adapters.errors import excerpt
from bank.items.profile import Item, Vectors, item_text, profile_embedding
from bank.items.tasks import Task
from bank.lookup.embedder import Embedder
from bank.lookup.signature import Signature
from server.errors import ApiError, InvalidRequest, Unavailable, UserErased
from server.gateway.access.quotas import Quotas
from server.gateway.access.shares import FairQueue
from server.gateway.users.histories import (
    HistoryDiff,
    HistoryLimit,
    StoredItems,
    add_to_history,
    diff_histories,
    replace_history,
    stored_bytes,
)
from server.gateway.users.passing import MEAN, Passing
from server.settings import MAX_ITEM_BYTES
from server.store.profile_record import OtherEmbedding, Profile, StoredSignature, StoredVector, as_stored
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

Embedded = dict[tuple[str, str], Vectors]  # embeddings [E] by item id and text


@dataclass(frozen=True, slots=True)
class ProfileUpdate:
    profile: Profile  # after the change
    changed: int  # as in `HistoryDiff`
    removed: int  # as in `Plan`


@dataclass(frozen=True, slots=True)
class HistoryRequest:
    """A change that was asked for; `embed` changes no item, and makes the embedding anew."""

    kind: Literal["replace", "add", "learn", "embed"]
    items: Sequence[Item] = ()
    epoch: str | None = None  # the user's when the request began; None: as first read
    keep: bool | None = True  # the API key's `Policy.keep_texts`


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request makes of a user's data as they were read."""

    snapshot: Snapshot
    history: StoredItems  # the texts that are stored after it
    writes: HistoryDiff
    removed: int  # number of earlier items that no longer count
    passing: Passing | None = None  # if texts are not kept

    @property
    def changes_nothing(self) -> bool:
        return not (self.writes.put or self.writes.drop or self.writes.changed)

    def growth(self) -> Held:
        """Return about what the change adds to the store; fewer than 0 bytes if it makes room."""
        added_bytes = stored_bytes(self.history) - stored_bytes(self.snapshot.items)
        return Held(people=self.snapshot.profile is None, bytes=added_bytes)


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
        return await self._change(user, HistoryRequest("replace", items, epoch, keep))

    async def add(self, user: User, items: Sequence[Item], epoch: str, keep: bool | None = None) -> ProfileUpdate:
        """Add items to the history, replacing items with the same id. Otherwise like `replace`."""
        return await self._change(user, HistoryRequest("add", items, epoch, keep))

    async def learn(self, user: User, item: Item, epoch: str, keep: bool | None = None) -> ProfileUpdate:
        """Add an item that was seen in passing. A signature is made at `SIGNED_AT` items and then daily.

        Each signature gives a new recipe, which finds no prefix in the engines' caches. Texts that are not kept cannot
        wait: they are signed at once. Otherwise like `replace`.
        """
        return await self._change(user, HistoryRequest("learn", [item], epoch, keep))

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
            return (await self._change(user, HistoryRequest("embed"))).profile
        except UserErased:
            return None
        except Exception as error:
            log.warning("a profile was not embedded again: %s", getattr(error, "explained", repr(error)))
            raise
        finally:
            del self._refreshing[user.key]

    async def _change(self, user: User, request: HistoryRequest) -> ProfileUpdate:
        line: asyncio.Lock | nullcontext[None] = nullcontext()
        if len(request.items) > EMBED_BATCH:  # a tenant's follow each other: else the first is done as late as the last
            line = self._long.setdefault(user.tenant, asyncio.Lock())
        async with line, self.places.held(user.tenant):
            return await self.rotation.at(user, lambda user: self._change_at(user, request))

    async def _change_at(self, user: User, request: HistoryRequest) -> ProfileUpdate:
        """Read and plan, embed new items, make the record, commit; start over if another request commits first."""
        plan = self._plan(request, await self.store.read(user.key))
        epoch = plan.snapshot.epoch if request.epoch is None else request.epoch
        embedded: Embedded = {}  # reused when an attempt starts over
        with self.quotas.admit(user, plan.growth):
            for attempt in range(MAX_ATTEMPTS):
                before = plan.snapshot.profile
                if plan.changes_nothing and before and (current := before.with_embedder(self.embedder.id)):
                    await self.store.wait_until_durable(user.key)
                    return ProfileUpdate(current, 0, 0)
                embedding, vectors = await self._embed(user.tenant, plan, embedded)
                profile = self._record(user, request, plan, embedding)
                change = Change(profile, plan.writes.put, vectors, plan.writes.drop)
                if await self.store.commit(user.key, plan.snapshot.version, change, epoch):
                    if not (self.no_evidence and profile.is_signed(self.no_evidence.bank)):
                        await self.request_signature(user)
                    return ProfileUpdate(profile, plan.writes.changed, plan.removed)
                await asyncio.sleep(random.uniform(0, min(_MAX_PAUSE_S, 0.001 * 2**attempt)))
                plan = self._plan(request, await self.store.read(user.key))
        raise Unavailable(
            f"too many other requests are changing this profile: gave up after {MAX_ATTEMPTS} attempts",
            code="contention",
        )

    def _plan(self, request: HistoryRequest, snapshot: Snapshot) -> Plan:
        """Apply a request to the history; UserErased if no item is left to make an embedding from."""
        before, history, replaces = snapshot.profile, snapshot.items, request.kind == "replace"
        if request.kind != "embed":
            history = (replace_history if replaces else add_to_history)(history, request.items, self.limit)
        if not history:
            raise UserErased
        passed = before is not None and not before.keeps_texts
        writes, keeps = (
            diff_histories(snapshot.items, history),
            self.keeps_texts(None if replaces else before, request.keep),
        )
        if keeps and not passed:
            return Plan(snapshot, history, writes, len(writes.drop))
        is_ours = before is not None and passed and not self.is_forgotten(before)
        passing = Passing.of(snapshot, history, self.limit.items, is_ours=is_ours, replaces=replaces)
        removed = passing.removed if passed else len(writes.drop)
        if keeps:  # from now on: the mean and the hashes go
            return Plan(snapshot, history, replace(writes, drop=(*writes.drop, *snapshot.vectors)), removed)
        texts, put = (passing.texts, passing.put) if self.signing else ({}, {})
        return Plan(snapshot, texts, HistoryDiff(put, passing.drop, len(passing.new)), removed, passing)

    async def _embed(self, tenant: str, plan: Plan, embedded: Embedded) -> tuple[Vectors, dict[str, StoredVector]]:
        """Return the profile's embedding [E], and the vectors to store."""
        items = plan.passing.new if plan.passing else plan.history
        vectors, fresh = await self._vectors(tenant, plan.snapshot, items, embedded)
        rows = list(vectors.values())
        if plan.passing:
            fresh = plan.passing.vectors(plan.snapshot, self.embedder.id, rows)
            rows = [fresh[MEAN].vector]
        return as_stored(profile_embedding(np.stack(rows))), fresh

    def _record(self, user: User, request: HistoryRequest, plan: Plan, embedding: Vectors) -> Profile:
        """Return the new record. What was learnt in passing keeps the old signature until the next is due."""
        before, passing, none = plan.snapshot.profile, plan.passing, self.no_evidence
        count = len(passing.hashes if passing else plan.history)
        profile = Profile(user.id, count, 0, self.embedder.id, embedding, keeps_texts=not passing)
        profile = _carry_over(before, profile, same_items=plan.changes_nothing)
        if passing:
            return replace(profile, signature=profile.signature if passing.counted else None, phrases=b"")
        if request.kind == "learn" and none and not signature_due(before, profile, none.bank):
            return replace(profile, signature=StoredSignature(profile.evidence or none, profile.updated_ms))
        return profile

    async def _vectors(
        self, tenant: str, snapshot: Snapshot, history: StoredItems, embedded: Embedded
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


def check_size(param: str, raw: bytes, shown: object, *, named: str = "", code: str = "sample_too_large") -> None:
    """Raise InvalidRequest if an item or sample is too large as JSON; `named` is what the message calls `param`."""
    if len(raw) > MAX_ITEM_BYTES:
        message = f"{named or param} has {len(raw)} bytes as JSON, at most {MAX_ITEM_BYTES} are allowed"
        raise InvalidRequest(f"{message}: {excerpt(shown)}", param=param, code=code)
