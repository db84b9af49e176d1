"""A user's profile, its binary record, and the encodings of items and vectors.

A record is `version u8`, then parts of `tag u8 · length u16 · bytes`, all little-endian, in tag order. Readers keep
unknown parts. With 384 fp16 numbers a record stays under 1 KiB; a Redis hash would be larger.
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
from bank.lookup.phrases import decode_phrases
from bank.lookup.signature import Signature, empty_signature

RECORD_VERSION = 1
LESSONS = 1.0  # increase it when items teach that taught nothing, so that users without a signature are signed again
_PART = struct.Struct("<BH")
_EMBEDDER_BYTES = 8

_REVISION, _USER_ID, _UPDATED, _ITEMS, _EMBEDDER, _EMBEDDING, _ADAPTER, _SIGNATURE, _OTHER, _PHRASES = range(1, 11)
_PASSING = 11  # texts are not kept
_REQUIRED = frozenset((_REVISION, _USER_ID, _UPDATED, _ITEMS, _EMBEDDER, _EMBEDDING))
_KNOWN = _REQUIRED | {_ADAPTER, _SIGNATURE, _OTHER, _PHRASES, _PASSING}
_HALF_BYTES = 2
_SIGNATURE_HEADER = struct.Struct("<4sIQf")  # bank, tokens, made_of_ms, length of the products; if empty, the lessons
_OTHER_HEADER = struct.Struct("<8sQ")  # embedder, made_of_ms


@dataclass(frozen=True, slots=True)
class AdapterNote:
    """A user's current adapter, noted in the profile record so that a request needs only one read."""

    id: str
    recipe: str  # recipe it was trained on and is always served with
    size_bytes: int
    created_ms: int  # time of promotion, Unix time
    made_in: str = ""  # traceparent of the job that trained it, if traced


@dataclass(frozen=True, slots=True)
class StoredSignature:
    """A user's signature (0 tokens if there was no data for one), and `updated_ms` of the profile it was made from."""

    signature: Signature
    made_of_ms: int
    lessons: float = LESSONS  # version of what an item teaches; known of empty signatures alone


@dataclass(frozen=True, slots=True)
class OtherEmbedding:
    """The profile's embedding [E] by a second embedder, used while gateways change embedders."""

    embedder: str
    embedding: Vectors
    made_of_ms: int  # `updated_ms` of the profile it was made from; valid only if that has not changed


@dataclass(frozen=True, slots=True)
class Profile:
    """The data about a user that a request needs."""

    user_id: str  # as sent by the app; stored nowhere else
    items: int  # number of stored items
    updated_ms: int  # when the items last changed, Unix time; increases with every change
    embedder: str  # embeddings of different embedders are never compared
    embedding: Vectors  # [E] float32 of unit length, stored as fp16
    adapter: AdapterNote | None = None
    signature: StoredSignature | None = None  # may be outdated, or for another bank
    other: OtherEmbedding | None = None
    phrases: bytes = b""  # phrase table, made with the signature from the same items for the same bank
    keeps_texts: bool = True  # else items stay until they are signed, and their vectors are `passing.py`'s
    extra: Mapping[int, bytes] = field(default_factory=dict)  # unknown parts, by tag

    def with_embedder(self, embedder: str) -> Profile | None:
        """Return the profile with its embedding by this embedder, or None if the current items have none."""
        if self.embedder == embedder:
            return self
        other = self.other
        if other is None or (other.embedder, other.made_of_ms) != (embedder, self.updated_ms):
            return None
        previous = OtherEmbedding(self.embedder, self.embedding, self.updated_ms)
        return replace(self, embedder=embedder, embedding=other.embedding, other=previous)

    @property
    def evidence(self) -> Signature | None:  # even if outdated
        return self.signature.signature if self.signature else None

    def is_forgotten(self, embedder: str, bank: str | None) -> bool:
        """Whether texts that were not kept serve another embedder or bank (None: one without signatures) alone."""
        if self.keeps_texts:
            return False
        return self.embedder != embedder or bool(bank and self.evidence and self.evidence.bank != bank)

    def is_signed(self, bank: str) -> bool:
        """Return whether the current items have a signature for a bank (8 hex digits).

        An empty one counts only if what items teach is still the same.
        """
        signed = self.signature
        if signed is None or (signed.signature.bank, signed.made_of_ms) != (bank, self.updated_ms):
            return False
        return signed.signature.tokens > 0 or signed.lessons == LESSONS


@dataclass(frozen=True, slots=True)
class StoredItem:
    """An item of a history. `order` is unique within the history and larger for newer items; it may have gaps."""

    order: int
    fields: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class StoredVector:
    """An item's embedding ([E] float32, stored as fp16) and its embedder's id."""

    embedder: str
    vector: Vectors


def encode_profile(profile: Profile) -> bytes:
    """Encode a record. A random revision makes each encoding unique, because commits compare whole records."""
    parts = {
        **profile.extra,
        _REVISION: secrets.token_bytes(8),
        _USER_ID: profile.user_id.encode(),
        _UPDATED: struct.pack("<Q", profile.updated_ms),
        _ITEMS: struct.pack("<I", profile.items),
        _EMBEDDER: bytes.fromhex(profile.embedder),
        _EMBEDDING: _half(profile.embedding),
    }
    if (note := profile.adapter) is not None:
        parts[_ADAPTER] = f"{note.id} {note.recipe} {note.size_bytes} {note.created_ms} {note.made_in}".encode()
    if profile.signature is not None:
        parts[_SIGNATURE] = _signature_bytes(profile.signature)
    if profile.phrases:
        parts[_PHRASES] = profile.phrases
    if not profile.keeps_texts:
        parts[_PASSING] = b""
    if profile.other is not None:
        head = _OTHER_HEADER.pack(bytes.fromhex(profile.other.embedder), profile.other.made_of_ms)
        parts[_OTHER] = head + _half(profile.other.embedding)
    body = b"".join(_PART.pack(tag, len(part)) + part for tag, part in sorted(parts.items()))
    return bytes([RECORD_VERSION]) + body


def decode_profile(record: bytes) -> Profile:
    """Decode a record; raises `ValueError` if the bytes are not a record of this version."""
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
        phrases=decode_phrases(parts.get(_PHRASES, b"")).tobytes(),
        keeps_texts=_PASSING not in parts,
        extra={tag: part for tag, part in parts.items() if tag not in _KNOWN},
    )


def encode_item(item: StoredItem) -> bytes:
    return orjson.dumps({"order": item.order, "fields": dict(item.fields)})


def decode_item(raw: bytes) -> StoredItem:
    value = orjson.loads(raw)
    return StoredItem(value["order"], value["fields"])


def encode_vector(stored: StoredVector) -> bytes:
    """Encode an embedding: the embedder's id (8 bytes), then fp16 [E]."""
    return bytes.fromhex(stored.embedder) + _half(stored.vector)


def decode_vector(raw: bytes) -> StoredVector:
    return StoredVector(raw[:_EMBEDDER_BYTES].hex(), _single(raw[_EMBEDDER_BYTES:]))


def as_stored(vector: Vectors) -> Vectors:
    """Round a vector [E] to fp16, as stored, so that sums do not depend on which vectors were read from the store."""
    return _single(_half(vector))


def _parts(record: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 1
    while offset < len(record):
        start = offset + _PART.size
        end = start + int.from_bytes(record[offset + 1 : start], "little")
        if end > len(record):
            raise ValueError("profile record is cut short")
        yield record[offset], record[start:end]
        offset = end


def _note(raw: bytes) -> AdapterNote:
    adapter, recipe, size_bytes, created_ms, made_in = raw.decode().split(" ")
    return AdapterNote(adapter, recipe, int(size_bytes), int(created_ms), made_in)


def _signature_bytes(stored: StoredSignature) -> bytes:
    """Encode products as a unit vector in fp16 and a length, since gradients are too small for fp16."""
    made = _finite(stored.signature)
    length = made.length
    last = length if made.tokens else stored.lessons
    head = _SIGNATURE_HEADER.pack(bytes.fromhex(made.bank), made.tokens, stored.made_of_ms, last)
    return head + _half(made.products / length if length else made.products)


def _stored_signature(raw: bytes) -> StoredSignature:
    (bank, tokens, made_of_ms, last), unit = _with_header(_SIGNATURE_HEADER, raw, "signature")
    made = _finite(Signature(bank.hex(), tokens, unit * np.float32(last)))
    return StoredSignature(made, made_of_ms) if tokens else StoredSignature(made, made_of_ms, last)


def _finite(made: Signature) -> Signature:
    """Return an empty signature instead of one that is not finite, since that cannot give a recipe."""
    return made if made.finite else empty_signature(made.bank, len(made.products))


def _other(raw: bytes) -> OtherEmbedding:
    (embedder, made_of_ms), embedding = _with_header(_OTHER_HEADER, raw, "second embedding")
    return OtherEmbedding(embedder.hex(), embedding, made_of_ms)


def _with_header(head: struct.Struct, raw: bytes, what: str) -> tuple[tuple[Any, ...], Vectors]:
    """Return the fields of a header, and the fp16 numbers after it."""
    if len(raw) < head.size or (len(raw) - head.size) % _HALF_BYTES:
        raise ValueError(f"profile record has a {what} of {len(raw)} bytes: it is cut short")
    return head.unpack_from(raw), _single(raw[head.size :])


def _half(vector: Vectors) -> bytes:
    return vector.astype("<f2").tobytes()


def _single(raw: bytes) -> Vectors:
    return np.frombuffer(raw, dtype="<f2").astype(np.float32)
