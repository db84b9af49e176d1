"""The profile record as bytes, and the small encodings beside it.

A record is `version u8`, then parts of `tag u8 · length u16 · bytes`, all little-endian, in tag order. A reader keeps
the parts it does not know, so the record can take up new kinds of evidence about a user without a migration. With 384
fp16 numbers it stays under 1 KiB, which a Redis hash of the same content would not.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator

import numpy as np
import orjson

from bank.items.profile import Vectors
from bank.lookup.signature import Signature, empty_signature
from server.store.profiles import AdapterNote, OtherEmbedding, Profile, StoredItem, StoredSignature, StoredVector

RECORD_VERSION = 1
_PART = struct.Struct("<BH")
_EMBEDDER_BYTES = 8

_REVISION, _USER_ID, _UPDATED, _ITEMS, _EMBEDDER, _EMBEDDING, _ADAPTER, _SIGNATURE, _OTHER = range(1, 10)
_REQUIRED = frozenset((_REVISION, _USER_ID, _UPDATED, _ITEMS, _EMBEDDER, _EMBEDDING))
_KNOWN = _REQUIRED | {_ADAPTER, _SIGNATURE, _OTHER}
_HALF_BYTES = 2
_SIGNED = struct.Struct("<4sIQf")  # bank, tokens, made of, length of the products
_OTHER_HEAD = struct.Struct("<8sQ")  # embedder, made of


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
    """Read a record.

    Raises:
        ValueError: when the bytes are not a record of this version.
    """
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
    if len(raw) < _SIGNED.size or (len(raw) - _SIGNED.size) % _HALF_BYTES:
        raise ValueError(f"profile record has a signature of {len(raw)} bytes: it is cut short")
    bank, tokens, made_of_ms, length = _SIGNED.unpack_from(raw)
    products = _single(raw[_SIGNED.size :]) * np.float32(length)
    return StoredSignature(_sound(Signature(bank.hex(), tokens, products)), made_of_ms)


def _sound(made: Signature) -> Signature:
    """The signature, or an empty one if it is not finite, since no recipe can be made from that."""
    return made if made.finite else empty_signature(made.bank, len(made.products))


def _other(raw: bytes) -> OtherEmbedding:
    if len(raw) < _OTHER_HEAD.size or (len(raw) - _OTHER_HEAD.size) % _HALF_BYTES:
        raise ValueError(f"profile record has a second embedding of {len(raw)} bytes: it is cut short")
    embedder, made_of_ms = _OTHER_HEAD.unpack_from(raw)
    return OtherEmbedding(embedder.hex(), _single(raw[_OTHER_HEAD.size :]), made_of_ms)


def _half(vector: Vectors) -> bytes:
    return vector.astype("<f2").tobytes()


def _single(raw: bytes) -> Vectors:
    return np.frombuffer(raw, dtype="<f2").astype(np.float32)
