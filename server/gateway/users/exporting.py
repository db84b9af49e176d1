"""`GET /users/{id}/export`: all that is stored of a person, and the adapter that serves them as others can load it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import orjson

from adapters.errors import MtaError
from adapters.recipe import UserAdapterId, parse_recipe
from bank.items.profile import Vectors
from bank.manifest import BankManifest
from bank.peft.exported import ExportedAdapter
from server.errors import UserErased
from server.store.adapters import AdapterStore, StoredAdapter
from server.store.jobs import Job, JobStore
from server.store.profile_record import AdapterNote, Profile
from server.store.profiles import ProfileStore, Snapshot
from server.store.samples import decode_sample
from server.store.tenants.user_key import User

_END = b'"}}}'


class Exporting:
    """Collects what is stored of a user; `bank` is the folder of the bank that is served."""

    def __init__(
        self, profiles: ProfileStore, *, jobs: JobStore, adapters: AdapterStore, bank: Path, manifest: BankManifest
    ) -> None:
        self._profiles = profiles
        self._jobs = jobs
        self._adapters = adapters
        self._bank = bank
        self._manifest = manifest

    async def export(self, user: User, job_answer: Callable[[Job], dict[str, Any]]) -> Iterator[bytes] | None:
        """All of it as one JSON object, in pieces; None for an unknown user. `job_answer` shows a job to clients.

        Raises:
            UserErased: when the user is erased meanwhile.
        """
        key = user.key
        snapshot = await self._profiles.read(key)
        profile = snapshot.profile
        if profile is None:
            return None
        samples, jobs = await self._jobs.samples(key), await self._jobs.jobs(key)
        note = profile.adapter
        stored = await self._adapters.adapter(UserAdapterId(key, note.id)) if note else None
        if await self._profiles.epoch(key) != snapshot.epoch:
            raise UserErased
        served, says = await asyncio.to_thread(self._served, stored) if stored else (None, "it is no longer stored")
        document = _record(profile) | {
            "items": [{"id": name, **item.fields} for name, item in snapshot.items.items()],
            "vectors": _vectors(snapshot),
            "samples": [
                {"messages": list(sample.messages), "output": sample.output} for sample in map(decode_sample, samples)
            ],
            "jobs": [job_answer(job) for job in jobs],
            "adapter": _adapter(note, stored, served, says) if note else None,
        }
        return _pieces(document, served)

    def _served(self, stored: StoredAdapter) -> tuple[ExportedAdapter | None, str]:
        """The whole adapter, and what it is in words, or why there is none."""
        try:
            served = ExportedAdapter(self._bank, self._manifest, parse_recipe(stored.recipe), stored.raw)
        except MtaError as error:
            return None, f"`stored` is the user's own part alone; the whole adapter cannot be made here: {error}"
        return served, (
            "`peft` is the whole adapter that serves this person: the anchors of its recipe, merged, and on top the "
            "user's own part, `stored`; scaling is in B"
        )


def _pieces(document: dict[str, Any], served: ExportedAdapter | None) -> Iterator[bytes]:
    """The JSON; the weights of an adapter, its last field, are never in memory as a whole."""
    raw = orjson.dumps(document)
    if served is None:
        yield raw
        return
    assert raw.endswith(_END)
    yield raw.removesuffix(_END)
    yield from _in_base64(served.weights())
    yield _END


def _record(profile: Profile) -> dict[str, Any]:
    signature, other = profile.signature, profile.other
    return {
        "user_id": profile.user_id,
        "updated_ms": profile.updated_ms,
        "embedder": profile.embedder,
        "embedding": _numbers(profile.embedding),
        "other_embedding": {
            "embedder": other.embedder,
            "embedding": _numbers(other.embedding),
            "made_of_ms": other.made_of_ms,
        }
        if other
        else None,
        "signature": {
            "bank": signature.signature.bank,
            "tokens": signature.signature.tokens,
            "products": _numbers(signature.signature.products),
            "made_of_ms": signature.made_of_ms,
        }
        if signature
        else None,
        "of_later_versions": {str(tag): _text(raw) for tag, raw in profile.extra.items()},
    }


def _adapter(
    note: AdapterNote, stored: StoredAdapter | None, served: ExportedAdapter | None, says: str
) -> dict[str, Any]:
    return {
        "id": note.id,
        "recipe": note.recipe,
        "created_ms": note.created_ms,
        "bytes": note.size_bytes,
        "traceparent": note.made_in or None,
        "sha256": stored.sha256 if stored else None,
        "says": says,
        "stored": _text(stored.raw) if stored else None,
        "peft": {"config": served.config(), "weights": ""} if served else None,
    }


def _vectors(snapshot: Snapshot) -> dict[str, dict[str, str]]:
    """Each item's embedding as it is stored: little-endian fp16 in base64."""
    return {
        name: {"embedder": stored.embedder, "fp16": _text(stored.vector.astype("<f2").tobytes())}
        for name, stored in snapshot.vectors.items()
    }


def _numbers(vector: Vectors) -> list[float]:
    return [float(number) for number in vector]


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _in_base64(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of bytes as pieces of one text in base64."""
    rest = b""
    for piece in pieces:
        data = rest + piece
        whole = len(data) - len(data) % 3
        yield base64.b64encode(data[:whole])
        rest = data[whole:]
    yield base64.b64encode(rest)
