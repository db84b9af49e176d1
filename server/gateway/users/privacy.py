"""Data-subject requests: export all data of a user, including the adapter in PEFT format, and erase a user."""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Callable, Coroutine, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import orjson

from adapters.errors import MtaError
from adapters.recipe import UserAdapterId, parse_recipe
from bank.manifest import BankManifest
from bank.peft.exported import ExportedAdapter
from server.clock import monday
from server.errors import Unavailable, UserErased
from server.store.adapters import StoredAdapter
from server.store.append_only_file import Rewrite
from server.store.jobs import Job
from server.store.opening import Stores
from server.store.profile_record import AdapterNote, Profile
from server.store.profiles import LATE, Erasure
from server.store.samples import decode_sample
from server.store.tenants.user_key import User


@dataclass
class Exporting:
    stores: Stores
    folder: Path  # of the served bank
    manifest: BankManifest

    async def export(self, user: User, job_answer: Callable[[Job], dict[str, Any]]) -> Iterator[bytes] | None:
        """Return the export as pieces of one JSON object, or None for an unknown user. `job_answer` formats a job.

        Of a person without a profile there may be feedback: then the fields of the record are missing.
        Raises UserErased if the user is erased during the export.
        """
        return await self.stores.rotation.at(user, lambda user: self._export(user, job_answer), writes=False)

    async def _export(self, user: User, job_answer: Callable[[Job], dict[str, Any]]) -> Iterator[bytes] | None:
        stores, profiles, key = self.stores, self.stores.profiles, user.key
        snapshot = await profiles.read(key)
        profile = snapshot.profile
        if profile is None and not await profiles.is_stored(key):
            return None
        samples = await stores.jobs.samples(key)
        jobs = await stores.jobs.jobs(key)
        feedback = await stores.feedback.entries(key)
        tally = await stores.tallies.tally(key)
        versions = (await stores.adapters.kept(key)).versions
        note = profile.adapter if profile else None
        stored = await stores.adapters.adapter(UserAdapterId(key, note.id)) if note else None
        now, _, epoch = await profiles.state(key)
        is_here = now is not None if profile else await profiles.is_stored(key)
        if not is_here or epoch != snapshot.epoch:  # moved away, or erased
            raise UserErased
        complete, says = await asyncio.to_thread(self._load, stored) if stored else (None, "it is no longer stored")
        placeholder = secrets.token_hex()  # random, so that no text of the user's contains it
        peft = {"config": complete.config(), "weights": placeholder} if complete else None
        fields: dict[str, Any] = _profile_fields(profile) if profile else {"user_id": user.id}
        document = fields | {
            "items": [{"id": name, **item.fields} for name, item in snapshot.items.items()],
            "vectors": {  # little-endian fp16, as stored
                name: {"embedder": embedding.embedder, "fp16": _base64(embedding.vector.astype("<f2").tobytes())}
                for name, embedding in snapshot.vectors.items()
            },
            "samples": list(map(decode_sample, samples)),
            "feedback": [
                {"answer": answer, "at_ms": entry.at_ms, **asdict(entry.feedback), "sample": entry.sample}
                for answer, entry in feedback.items()
            ],
            "tally": [
                {"week": monday(cell.week), "level": cell.level, "arm": cell.arm, **asdict(counts)}
                for cell, counts in tally.items()
            ],
            "jobs": [job_answer(job) for job in jobs],
            "adapters": versions,
            "adapter": _adapter_fields(note, stored, says) | {"peft": peft} if note else None,
        }
        return _json_pieces(document, placeholder, complete.weights() if complete else ())

    def _load(self, stored: StoredAdapter) -> tuple[ExportedAdapter | None, str]:
        """Return the complete adapter and its description, or None and the reason why it cannot be built."""
        try:
            complete = ExportedAdapter(self.folder, self.manifest, parse_recipe(stored.recipe), stored.raw)
        except MtaError as error:
            return None, f"`stored` is the user's own part alone; the whole adapter cannot be made here: {error}"
        acts = f"; here it acts {self.manifest.acts}, elsewhere everywhere" if self.manifest.shares_prompts else ""
        return complete, (
            "`peft` is the whole adapter that serves this user: the anchors of its recipe, merged, and on top the "
            f"user's own part, `stored`; the B matrices already include the LoRA scaling{acts}"
        )


@dataclass
class Erasing:
    stores: Stores
    bank: str  # 8 hex digits of the served bank
    drop: Callable[[str], Coroutine[Any, Any, None]]  # drops a user's adapters from every engine
    _dropping: set[asyncio.Task[None]] = field(default_factory=set)

    async def erase(self, user: User) -> Erasure | None:
        """Erase a user; return None if the store has neither data nor an erasure record of the user.

        Every step is idempotent: a repeated DELETE finishes one that failed half-way and returns the same answer. An
        unreachable engine needs no retry: engines check every adapter they hold against the store. While there are two
        secrets, the user may move from either key to the other between two steps: so the first is erased twice. In the
        end both keys are in the same epoch, for it is read at one of them and the user may be stored at the other.
        """
        first, last = secrets.token_hex(8), secrets.token_hex(8)
        epochs = (user.every_key[0], first), *((key, last) for key in (*user.keys[1:], *user.keys[:1]))
        known = list(filter(None, [await self._erase(key, user.tenant, epoch) for key, epoch in epochs]))
        until_ms = max((erasure.rewritten_by_ms for erasure in known), default=0)
        return replace(max(known, key=lambda erasure: erasure.erased.keys), rewritten_by_ms=until_ms) if known else None

    async def _erase(self, key: str, tenant: str, epoch: str) -> Erasure | None:
        was_stored = await self.stores.profiles.is_stored(key)
        rewrite = await self.stores.file.announce(key) if was_stored else Rewrite(0, 0)
        try:
            erasure = await self.stores.profiles.erase(key, rewrite.erase_by_ms, rewrite.rewritten_by_ms, epoch)
        except Unavailable as error:
            if was_stored or error.code != LATE:
                raise
            return await self._erase(key, tenant, epoch)  # something has been stored meanwhile
        if erasure is None:
            return None
        await self.stores.leave_shared_keys(key, tenant, (self.bank, *erasure.banks))
        if erasure.erased.adapters:
            task = asyncio.create_task(self.drop(key))
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)
        return erasure


def _profile_fields(profile: Profile) -> dict[str, Any]:
    signature = profile.signature
    return {
        "user_id": profile.user_id,
        "updated_ms": profile.updated_ms,
        "embedder": profile.embedder,
        "embedding": profile.embedding,
        "keeps_texts": profile.keeps_texts,
        "other_embedding": profile.other,
        "signature": {**asdict(signature.signature), "made_of_ms": signature.made_of_ms} if signature else None,
        "phrases": _base64(profile.phrases),
        "of_later_versions": {str(tag): _base64(raw) for tag, raw in profile.extra.items()},
    }


def _adapter_fields(note: AdapterNote, stored: StoredAdapter | None, says: str) -> dict[str, Any]:
    return {
        "id": note.id,
        "recipe": note.recipe,
        "created_ms": note.created_ms,
        "bytes": note.size_bytes,
        "traceparent": note.made_in or None,
        "sha256": stored.sha256 if stored else None,
        "says": says,
        "stored": _base64(stored.raw) if stored else None,
    }


def _json_pieces(document: dict[str, Any], placeholder: str, weights: Iterable[bytes]) -> Iterator[bytes]:
    """Yield the JSON with the weights in place of `placeholder`, in base64; they are never in memory all at once."""
    raw = orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
    before, _, after = raw.partition(placeholder.encode())
    yield before
    rest = b""
    for piece in weights:
        data = rest + piece
        whole = len(data) - len(data) % 3
        yield base64.b64encode(data[:whole])
        rest = data[whole:]
    yield base64.b64encode(rest)
    yield after


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
