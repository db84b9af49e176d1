"""The store's port: what is kept of a user, and the few things that the rest of the gateway may ask for.

Three things are kept under a user's key (`server/user_key.py`): the profile record, the items it was made of, and the
items' embeddings. The record alone serves a request; the other two serve the next change. Embeddings of items can be
dropped at any time, they are remade from the items.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from bank.profile import Vectors
from bank.signature import Signature


@dataclass(frozen=True, slots=True)
class AdapterNote:
    """Which user adapter a user has: the record says it, so that a request reads nothing else.

    Attributes:
        id: of the adapter.
        recipe: name of the recipe it was trained on, which it is always served with.
        size_bytes: of what is kept.
        created_ms: when it was promoted, Unix time in milliseconds.
    """

    id: str
    recipe: str
    size_bytes: int
    created_ms: int


@dataclass(frozen=True, slots=True)
class StoredSignature:
    """A user's signature, and the profile that it was made of.

    Attributes:
        signature: with 0 tokens when there was nothing to make one of.
        made_of_ms: `updated_ms` of that profile.
    """

    signature: Signature
    made_of_ms: int


@dataclass(frozen=True, slots=True)
class Profile:
    """The profile record.

    Attributes:
        user_id: as the app gave it; it stands nowhere else.
        items: how many items are kept.
        updated_ms: when it last changed, Unix time in milliseconds.
        embedder: id of the embedder that made the embedding; an embedding is never compared across embedders.
        embedding: [E] float32 at unit length, kept as fp16.
        adapter: the user adapter, if there is one.
        signature: if one was made; it may be of an earlier profile, or of another bank.
        extra: parts of the record that this version does not know, by tag: they are carried along untouched.
    """

    user_id: str
    items: int
    updated_ms: int
    embedder: str
    embedding: Vectors
    adapter: AdapterNote | None = None
    signature: StoredSignature | None = None
    extra: Mapping[int, bytes] = field(default_factory=dict)

    @property
    def evidence(self) -> Signature | None:
        """The signature, however old."""
        return self.signature.signature if self.signature else None

    def is_signed(self, bank: str) -> bool:
        """Whether there is a signature for a bank (its 8 hex digits), of the items as they are now."""
        signed = self.signature
        return signed is not None and (signed.signature.bank, signed.made_of_ms) == (bank, self.updated_ms)


@dataclass(frozen=True, slots=True)
class StoredItem:
    """One item in its history.

    Attributes:
        order: its place: larger is newer. Unique within a history, not dense.
        fields: as in `bank.profile.Item`.
    """

    order: int
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class StoredVector:
    """One item's embedding.

    Attributes:
        embedder: id of the embedder that made it.
        vector: [E] float32, kept as fp16.
    """

    embedder: str
    vector: Vectors


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything kept of a user, as it was at one moment.

    Attributes:
        version: what `commit` compares; empty when the user is unknown.
        profile: None when the user is unknown.
        items: by id, the oldest first.
        vectors: by item id; some or all may be missing.
    """

    version: bytes
    profile: Profile | None
    items: Mapping[str, StoredItem]
    vectors: Mapping[str, StoredVector]


@dataclass(frozen=True, slots=True)
class Change:
    """What one commit writes.

    Attributes:
        profile: the new record.
        put_items: items that are new or differ, by id.
        put_vectors: embeddings that are new or differ, by item id.
        drop: ids of items that go, with their embeddings.
    """

    profile: Profile
    put_items: Mapping[str, StoredItem]
    put_vectors: Mapping[str, StoredVector]
    drop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Erased:
    """What `erase` removed: items, samples, jobs and user adapters, and keys of the store in all."""

    items: int
    samples: int
    jobs: int
    adapters: int
    keys: int


class ProfileStore(Protocol):
    """Keeps profiles. Every method raises `Unavailable` when the store cannot be reached or refuses."""

    async def load(self, key: str) -> Profile | None:
        """The record alone: what a request needs."""

    async def read(self, key: str) -> Snapshot:
        """Everything, consistent in itself: what a change starts from."""

    async def items(self, key: str) -> Mapping[str, StoredItem]:
        """The items alone, by id, the oldest first; empty for an unknown user."""

    async def commit(self, key: str, version: bytes, change: Change) -> bool:
        """Write a change made from the snapshot of `version`, whole or not at all.

        Returns:
            True when it is written and on disk; False when somebody else changed the user meanwhile.
        """

    async def erase(self, key: str) -> Erased | None:
        """Remove all of a user, on disk before it returns; None when there is nothing."""

    async def stored_bytes(self, key: str) -> int:
        """Memory that the user takes in the store."""
