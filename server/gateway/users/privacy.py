"""What a person may ask for: all that is stored of them, with their adapter as others can load it, and its erasure."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import orjson

from adapters.errors import MtaError
from adapters.recipe import UserAdapterId, parse_recipe
from bank.manifest import BankManifest
from bank.peft.exported import ExportedAdapter
from server.errors import UserErased
from server.store.adapters import AdapterStore, StoredAdapter
from server.store.durability import RewritableFile
from server.store.jobs import Job, JobStore
from server.store.profiles import Erasure, ProfileStore
from server.store.queue import UserQueue
from server.store.samples import decode_sample
from server.store.tenants.user_key import User

_END = b'"}}}'


@dataclass
class Exporting:
    """Collects what is stored of a user; `bank` is the folder of the bank that is served."""

    profiles: ProfileStore
    jobs: JobStore
    adapters: AdapterStore
    bank: Path
    manifest: BankManifest

    async def export(self, user: User, job_answer: Callable[[Job], dict[str, Any]]) -> Iterator[bytes] | None:
        """All of it as one JSON object, in pieces; None for an unknown user. `job_answer` shows a job to clients.

        Raises UserErased when the user is erased meanwhile.
        """
        key = user.key
        snapshot = await self.profiles.read(key)
        profile = snapshot.profile
        if profile is None:
            return None
        samples, jobs = await self.jobs.samples(key), await self.jobs.jobs(key)
        note = profile.adapter
        stored = await self.adapters.adapter(UserAdapterId(key, note.id)) if note else None
        if await self.profiles.epoch(key) != snapshot.epoch:
            raise UserErased
        served, says = await asyncio.to_thread(self._served, stored) if stored else (None, "it is no longer stored")
        signed = profile.signature
        document = {
            "user_id": profile.user_id,
            "updated_ms": profile.updated_ms,
            "embedder": profile.embedder,
            "embedding": profile.embedding,
            "other_embedding": profile.other,
            "signature": {**asdict(signed.signature), "made_of_ms": signed.made_of_ms} if signed else None,
            "of_later_versions": {str(tag): _text(raw) for tag, raw in profile.extra.items()},
            "items": [{"id": name, **item.fields} for name, item in snapshot.items.items()],
            "vectors": {  # as they are stored: little-endian fp16
                name: {"embedder": one.embedder, "fp16": _text(one.vector.astype("<f2").tobytes())}
                for name, one in snapshot.vectors.items()
            },
            "samples": list(map(decode_sample, samples)),
            "jobs": [job_answer(job) for job in jobs],
            "adapter": None,
        }
        if note:
            document["adapter"] = {
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
        return _pieces(document, served)

    def _served(self, stored: StoredAdapter) -> tuple[ExportedAdapter | None, str]:
        """The whole adapter, and what it is in words, or why there is none."""
        try:
            served = ExportedAdapter(self.bank, self.manifest, parse_recipe(stored.recipe), stored.raw)
        except MtaError as error:
            return None, f"`stored` is the user's own part alone; the whole adapter cannot be made here: {error}"
        return served, (
            "`peft` is the whole adapter that serves this person: the anchors of its recipe, merged, and on top the "
            "user's own part, `stored`; scaling is in B"
        )


@dataclass
class Erasing:
    """Erases users."""

    profiles: ProfileStore
    adapters: AdapterStore
    jobs: JobStore
    signing: Callable[[str], UserQueue]  # of a bank, by its 8 hex digits
    bank: str  # the one that is served
    log_file: RewritableFile
    drop: Callable[[str], Coroutine[Any, Any, None]]  # has every engine drop a user's adapters, by the user's key
    _dropping: set[asyncio.Task[None]] = field(default_factory=set)

    async def erase(self, user: User) -> Erasure | None:
        """Erase a user; None if nothing was ever stored about them, or that is no longer remembered.

        Each step may be repeated: a DELETE that failed half-way is finished by the next, which gets the same answer.
        An engine that cannot be reached finds out by itself: it asks the store about every adapter that it keeps.
        """
        key = user.key
        is_nobody, erasure = await self.profiles.erase_if_unknown(key)
        if not is_nobody:
            asked = await self.log_file.request_rewrite(key)
            erasure = await self.profiles.erase(key, asked.erase_by_ms, asked.rewritten_by_ms)
        if erasure is None:
            return None
        await self.adapters.remove_adapted(key)
        for bank in {self.bank, *erasure.banks, *await self.adapters.banks()}:
            await self.jobs.remove_erased(key, bank)
            await self.signing(bank).remove_erased(key)
        if erasure.erased.adapters:
            task = asyncio.create_task(self.drop(key))
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)
        return erasure


def _pieces(document: dict[str, Any], served: ExportedAdapter | None) -> Iterator[bytes]:
    """The JSON; the weights of an adapter, its last field, are never in memory as a whole."""
    raw = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    if served is None:
        yield raw
        return
    assert raw.endswith(_END)
    yield raw.removesuffix(_END)
    yield from _in_base64(served.weights())
    yield _END


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
