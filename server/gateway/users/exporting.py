"""`GET /users/{id}/export`: all that is stored of a person, and the adapter that serves them as others can load it."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from server.store.profiles import AdapterNote, Profile, ProfileStore, Snapshot
from server.store.samples import decode_sample
from server.store.tenants.user_key import User

_END = b'"}}}'


@dataclass(frozen=True, slots=True)
class Export:
    """What is stored of a person.

    Attributes:
        record: the profile record, as JSON values.
        items: oldest first, each with its id.
        vectors: the items' embeddings, by item id.
        samples: oldest first.
        jobs: those that are remembered, oldest first.
        adapter: the user adapter as it is stored, and what it is; None without one.
        served: the whole of the adapter that serves them; None without a user adapter, or where it cannot be made.
    """

    record: dict[str, Any]
    items: list[dict[str, str]]
    vectors: dict[str, dict[str, str]]
    samples: list[dict[str, Any]]
    jobs: list[Job]
    adapter: dict[str, Any] | None
    served: ExportedAdapter | None

    def pieces(self, jobs: list[Any]) -> Iterator[bytes]:
        """One JSON object, in pieces: the weights of an adapter are never in memory as a whole.

        Args:
            jobs: as clients see them.
        """
        document = self.record | {"items": self.items, "vectors": self.vectors, "samples": self.samples, "jobs": jobs}
        if self.adapter is None or self.served is None:
            yield orjson.dumps(document | {"adapter": self.adapter})
            return
        peft = {"config": self.served.config(), "weights": ""}
        raw = orjson.dumps(document | {"adapter": self.adapter | {"peft": peft}})
        assert raw.endswith(_END)
        yield raw.removesuffix(_END)
        yield from _in_base64(self.served.weights())
        yield _END


class Exporting:
    """Collects what is stored of a user.

    Args:
        profiles, jobs, adapters: where it is kept.
        bank: the folder of the bank that is served.
        manifest: its manifest.
    """

    def __init__(
        self,
        profiles: ProfileStore,
        *,
        jobs: JobStore,
        adapters: AdapterStore,
        bank: Path,
        manifest: BankManifest,
    ) -> None:
        self._profiles = profiles
        self._jobs = jobs
        self._adapters = adapters
        self._bank = bank
        self._manifest = manifest

    async def export(self, user: User) -> Export | None:
        """All of it; None for an unknown user.

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
        return Export(
            record=_record(profile),
            items=[{"id": name, **item.fields} for name, item in snapshot.items.items()],
            vectors=_vectors(snapshot),
            samples=[
                {"messages": list(sample.messages), "output": sample.output} for sample in map(decode_sample, samples)
            ],
            jobs=jobs,
            adapter=_adapter(note, stored, says) if note else None,
            served=served,
        )

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


def _adapter(note: AdapterNote, stored: StoredAdapter | None, says: str) -> dict[str, Any]:
    return {
        "id": note.id,
        "recipe": note.recipe,
        "created_ms": note.created_ms,
        "bytes": note.size_bytes,
        "traceparent": note.made_in or None,
        "sha256": stored.sha256 if stored else None,
        "says": says,
        "stored": _text(stored.raw) if stored else None,
        "peft": None,
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
