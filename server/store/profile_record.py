"""A user's profile, the record that it is kept as, and the small encodings beside it.

A record is `version u8`, then parts of `tag u8 · length u16 · bytes`, all little-endian, in tag order. A reader keeps
the parts that it does not know. With 384 fp16 numbers it stays under 1 KiB, which a Redis hash would not.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import orjson

from bank.items.profile import Vectors
from bank.lookup.signature import Signature, empty_signature

RECORD_VERSION = 1
_PART = struct.Struct("<BH")
_EMBEDDER_BYTES = 8

_REVISION, _USER_ID, _UPDATED, _ITEMS, _EMBEDDER, _EMBEDDING, _ADAPTER, _SIGNATURE, _OTHER = range(1, 10)
_REQUIRED = frozenset((_REVISION, _USER_ID, _UPDATED, _ITEMS, _EMBEDDER, _EMBEDDING))
_KNOWN = _REQUIRED | {_ADAPTER, _SIGNATURE, _OTHER}
_HALF_BYTES = 2
_SIGNED = struct.Struct("<4sIQf")  # bank, tokens, made of, length of the products
_OTHER_HEAD = struct.Struct("<8sQ")  # embedder, made of


@dataclass(frozen=True, slots=True)
class AdapterNote:
    """Which user adapter a user has, noted in the record so that a request reads nothing else."""

    id: str
    recipe: str  # the one that it was trained on, with which it is always served
    size_bytes: int
    created_ms: int  # when it was promoted, Unix time
    made_in: str = ""  # traceparent of the job that made it, if that was traced


@dataclass(frozen=True, slots=True)
class StoredSignature:
    """A user's signature, of 0 tokens if there was nothing to make one from, and `updated_ms` of its profile."""

    signature: Signature
    made_of_ms: int


@dataclass(frozen=True, slots=True)
class OtherEmbedding:
    """The profile's embedding [E] by a second embedder, kept while gateways move from one to the other.

    It is void unless `made_of_ms` is the profile's `updated_ms`.
    """

    embedder: str
    embedding: Vectors
    made_of_ms: int


@dataclass(frozen=True, slots=True)
class Profile:
    """What a request needs to know of a user."""

    user_id: str  # as the app gave it; stored nowhere else
    items: int  # how many are kept
    updated_ms: int  # when the items last changed, Unix time; increases with every change
    embedder: str  # embeddings of two embedders are never compared
    embedding: Vectors  # [E] float32 at unit length, kept as fp16
    adapter: AdapterNote | None = None
    signature: StoredSignature | None = None  # maybe of an earlier profile, or for another bank
    other: OtherEmbedding | None = None
    extra: Mapping[int, bytes] = field(default_factory=dict)  # parts that this version does not know, by tag

    def with_embedder(self, embedder: str) -> Profile | None:
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
    """One item of a history; larger orders are newer, unique within a history, not dense."""

    order: int
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class StoredVector:
    """An item's embedding [E] float32, kept as fp16, and the id of the embedder that made it."""

    embedder: str
    vector: Vectors


def encode_profile(profile: Profile) -> bytes:
    """The record's bytes. A random revision makes each encoding unique: commits compare whole records."""
    parts = {
        **profile.extra,
        _REVISION: secrets.token_bytes(8),
        _USER_ID: profile.user_id.encode(),
        _UPDATED: struct.pack("<Q", profile.updated_ms),
        _ITEMS: struct.pack("<I", profile.items),
        _EMBEDDER: bytes.fromhex(profile.embedder),
        _EMBEDDING: _half(profile.embedding),
    }
    if profile.adapter is not None:
        note = profile.adapter
        parts[_ADAPTER] = f"{note.id} {note.recipe} {note.size_bytes} {note.created_ms} {note.made_in}".encode()
    if profile.signature is not None:
        parts[_SIGNATURE] = _signed(profile.signature)
    if profile.other is not None:
        head = _OTHER_HEAD.pack(bytes.fromhex(profile.other.embedder), profile.other.made_of_ms)
        parts[_OTHER] = head + _half(profile.other.embedding)
    body = b"".join(_PART.pack(tag, len(part)) + part for tag, part in sorted(parts.items()))
    return bytes([RECORD_VERSION]) + body


def decode_profile(record: bytes) -> Profile:
    """Raises `ValueError` of bytes that are not a record of this version."""
    if not record or record[0] != RECORD_VERSION:
        version = record[:1].hex() or "none"
        raise ValueError(f"profile record has version {version}, this gateway reads {RECORD_VERSION}")
    parts = dict(_parts(record))
    if not parts.keys() >= _REQUIRED:
        raise ValueError(f"profile record lacks the parts {sorted(_REQUIRED - parts.keys())}")
    return Profile(
        user_id=parts[_USER_ID].decode(),
        items=int.from_bytes(parts[_ITEMS], "little"),
        updated_ms=int.from_bytes(parts[_UPDATED], "little"),
        embedder=parts[_EMBEDDER].hex(),
        embedding=_single(parts[_EMBEDDING]),
        adapter=_note(parts[_ADAPTER]) if _ADAPTER in parts else None,
        signature=_stored_signature(parts[_SIGNATURE]) if _SIGNATURE in parts else None,
        other=_other(parts[_OTHER]) if _OTHER in parts else None,
        extra={tag: part for tag, part in parts.items() if tag not in _KNOWN},
    )


def encode_item(item: StoredItem) -> bytes:
    return orjson.dumps({"order": item.order, "fields": dict(item.fields)})


def decode_item(raw: bytes) -> StoredItem:
    value = orjson.loads(raw)
    return StoredItem(value["order"], value["fields"])


def encode_vector(stored: StoredVector) -> bytes:
    """An item's embedding: its embedder's id (8 bytes), then fp16 [E]."""
    return bytes.fromhex(stored.embedder) + _half(stored.vector)


def decode_vector(raw: bytes) -> StoredVector:
    return StoredVector(raw[:_EMBEDDER_BYTES].hex(), _single(raw[_EMBEDDER_BYTES:]))


def as_stored(vector: Vectors) -> Vectors:
    """A vector [E] as it will be read back: rounded to fp16. So sums do not depend on which vectors were stored."""
    return _single(_half(vector))


def _parts(record: bytes) -> Iterator[tuple[int, bytes]]:
    place = 1
    while place < len(record):
        if place + _PART.size > len(record):
            raise ValueError("profile record is cut short")
        tag, length = _PART.unpack_from(record, place)
        place += _PART.size
        if place + length > len(record):
            raise ValueError("profile record is cut short")
        yield tag, record[place : place + length]
        place += length


def _note(raw: bytes) -> AdapterNote:
    adapter, recipe, size_bytes, created_ms, made_in = raw.decode().split(" ")
    return AdapterNote(adapter, recipe, int(size_bytes), int(created_ms), made_in)


def _signed(stored: StoredSignature) -> bytes:
    """The products scaled to unit length in fp16, and their length: gradients are small numbers."""
    made = _sound(stored.signature)
    length = made.length
    head = _SIGNED.pack(bytes.fromhex(made.bank), made.tokens, stored.made_of_ms, length)
    return head + _half(made.products / length if length else made.products)


def _stored_signature(raw: bytes) -> StoredSignature:
    (bank, tokens, made_of_ms, length), unit = _headed(_SIGNED, raw, "signature")
    return StoredSignature(_sound(Signature(bank.hex(), tokens, unit * np.float32(length))), made_of_ms)


def _sound(made: Signature) -> Signature:
    """The signature, or an empty one if it is not finite, since no recipe can be made from that."""
    return made if made.finite else empty_signature(made.bank, len(made.products))


def _other(raw: bytes) -> OtherEmbedding:
    (embedder, made_of_ms), embedding = _headed(_OTHER_HEAD, raw, "second embedding")
    return OtherEmbedding(embedder.hex(), embedding, made_of_ms)


def _headed(head: struct.Struct, raw: bytes, what: str) -> tuple[tuple[Any, ...], Vectors]:
    """The fields of a head, and the fp16 numbers behind it."""
    if len(raw) < head.size or (len(raw) - head.size) % _HALF_BYTES:
        raise ValueError(f"profile record has a {what} of {len(raw)} bytes: it is cut short")
    return head.unpack_from(raw), _single(raw[head.size :])


def _half(vector: Vectors) -> bytes:
    return vector.astype("<f2").tobytes()


def _single(raw: bytes) -> Vectors:
    return np.frombuffer(raw, dtype="<f2").astype(np.float32)
