"""The store's port for profiles: what is kept about a user, and what the rest of the gateway may ask for.

Three things are kept under a user's key (`server/store/tenants/user_key.py`): the profile record, the items it was made
from, and the items' embeddings. The record alone serves a request; the other two serve the next change. Item embeddings
can be dropped at any time: they are remade from the items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

from bank.items.profile import Vectors
from bank.lookup.signature import Signature


@dataclass(frozen=True, slots=True)
class AdapterNote:
    """Which user adapter a user has, noted in the record so that a request reads nothing else.

    Attributes:
        recipe: name of the recipe it was trained on, which it is always served with.
        created_ms: when it was promoted, Unix time in milliseconds.
        made_in: traceparent of the job that made it; empty if that was not traced.
    """

    id: str
    recipe: str
    size_bytes: int
    created_ms: int
    made_in: str = ""


@dataclass(frozen=True, slots=True)
class StoredSignature:
    """A user's signature, with 0 tokens if there was nothing to make one from; and `updated_ms` of the profile that it
    was made from."""

    signature: Signature
    made_of_ms: int


@dataclass(frozen=True, slots=True)
class OtherEmbedding:
    """The profile's embedding [E] by a second embedder, kept while gateways move from one to the other.

    `made_of_ms` is `updated_ms` of the profile that it was made from; it is void for any other.
    """

    embedder: str
    embedding: Vectors
    made_of_ms: int


@dataclass(frozen=True, slots=True)
class Profile:
    """The profile record.

    Attributes:
        user_id: as the app gave it; stored nowhere else.
        items: how many items are kept.
        updated_ms: when its items last changed, Unix time in milliseconds; increases with every change.
        embedder: id of the embedder that made the embedding; an embedding is never compared across embedders.
        embedding: [E] float32 at unit length, kept as fp16.
        signature: if one was made; it may be for an earlier profile, or for another bank.
        extra: parts of the record that this version does not know, by tag; kept untouched.
    """

    user_id: str
    items: int
    updated_ms: int
    embedder: str
    embedding: Vectors
    adapter: AdapterNote | None = None
    signature: StoredSignature | None = None
    other: OtherEmbedding | None = None
    extra: Mapping[int, bytes] = field(default_factory=dict)

    def seen_by(self, embedder: str) -> Profile | None:
        """The profile with its embedding by this embedder; None if there is none of the current items."""
        if self.embedder == embedder:
            return self
        other = self.other
        if other is None or (other.embedder, other.made_of_ms) != (embedder, self.updated_ms):
            return None
        mine = OtherEmbedding(self.embedder, self.embedding, self.updated_ms)
        return replace(self, embedder=embedder, embedding=other.embedding, other=mine)

    @property
    def evidence(self) -> Signature | None:
        """The signature, however old."""
        return self.signature.signature if self.signature else None

    def is_signed(self, bank: str) -> bool:
        """Whether there is a signature of the current items for a bank (8 hex digits)."""
        signed = self.signature
        return signed is not None and (signed.signature.bank, signed.made_of_ms) == (bank, self.updated_ms)


@dataclass(frozen=True, slots=True)
class StoredItem:
    """One item in a history: its fields, and its place there; larger is newer, unique within a history, not dense."""

    order: int
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class StoredVector:
    """One item's embedding, [E] float32, kept as fp16, and the id of the embedder that made it."""

    embedder: str
    vector: Vectors


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A user's profile with its items and vectors, as they were at one moment.

    Attributes:
        version: what `commit` compares; empty when the user is unknown.
        epoch: identifies the user's last erasure; empty when none is remembered.
        profile: None when the user is unknown.
        items: by id, oldest first.
        vectors: by item id; some or all may be missing.
    """

    version: bytes
    epoch: str
    profile: Profile | None
    items: Mapping[str, StoredItem]
    vectors: Mapping[str, StoredVector]


@dataclass(frozen=True, slots=True)
class Change:
    """What one commit writes: the new record; items and embeddings that are new or differ, by item id; the ids of items
    to remove, with their embeddings."""

    profile: Profile
    put_items: Mapping[str, StoredItem]
    put_vectors: Mapping[str, StoredVector]
    drop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Erased:
    """How much an erasure removed; `keys` are all of the store's, whatever they held."""

    items: int
    samples: int
    jobs: int
    adapters: int
    keys: int


@dataclass(frozen=True, slots=True)
class Erasure:
    """An erasure, as it is remembered.

    Attributes:
        rewritten_by_ms: by when it is gone from the store's file on disk too, Unix time in milliseconds.
        banks: the banks (8 hex digits) of the jobs that it removed.
    """

    erased: Erased
    rewritten_by_ms: int
    banks: tuple[str, ...] = ()


class ProfileStore(Protocol):
    """Keeps profiles. Every method raises `Unavailable` when the store cannot be reached or refuses.

    Erasing a user starts a new *epoch*. A write names the epoch that it saw when it began, and is refused when another
    has begun since: a write in progress when a user is erased stores nothing of them.
    """

    async def load(self, key: str) -> Profile | None:
        """The record alone: all that a request needs."""

    async def read(self, key: str) -> Snapshot:
        """A consistent snapshot: what a change starts from."""

    async def items(self, key: str) -> Mapping[str, StoredItem]:
        """The items alone, by id, oldest first; empty for an unknown user."""

    async def epoch(self, key: str) -> str:
        """Identifies the user's last erasure; empty when none is remembered."""

    async def commit(self, key: str, version: bytes, change: Change, epoch: str = "") -> bool:
        """Write a change made from the snapshot of `version`, all or nothing: true when it is on disk, false when
        someone else changed the user meanwhile.

        Raises:
            UserErased: when the user has been erased since `epoch`, the user's when work on the change began.
        """

    async def settle(self, key: str) -> None:
        """Return once what `read` has shown of a user lasts as what is committed does.

        It may have shown a change that its writer was told to send again, since no disk or no replica had it in time.
        """

    async def erase_nobody(self, key: str) -> tuple[bool, Erasure | None]:
        """Erase a user of whom nothing is stored, so that what is under way stores nothing either; nobody else.

        Returns whether nothing is stored, and if so, the last erasure that is remembered.
        """

    async def erase(self, key: str, deadline_ms: int, rewritten_by_ms: int) -> Erasure | None:
        """Remove everything stored about a user, on disk before it returns.

        Returns the erasure; if nothing was stored, the last one that is remembered; None for an unknown user.

        Raises:
            Unavailable: also when the store's clock is past `deadline_ms`, Unix time in milliseconds.
        """

    async def stored_bytes(self, key: str) -> int:
        """Memory that the user's profile, items and vectors take in the store."""


class SignQueue(Protocol):
    """Users who need a signature for one bank. Every method raises `Unavailable` when the store cannot be used.

    A user who is already waiting is queued once. A user whose worker died is taken again.
    """

    async def request(self, user_key: str) -> None:
        """Have a worker make a user's signature."""

    async def take(self, wait_s: float) -> str | None:
        """Wait for a user who needs one; by now they may be gone, or have it."""

    async def begin(self, user_key: str) -> int:
        """Count a worker's attempt to make it; returns the number of attempts since `done`, from 1; 0 for a user who is
        no longer in the queue."""

    async def done(self, user_key: str) -> None:
        """Take a user out of the queue, unless they were asked for again since they were taken."""

    async def withdraw(self, user_key: str) -> None:
        """Remove an erased user from the queue."""
