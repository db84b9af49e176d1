"""User adapters, one key per user, and the sets of users by bank.

Some of a user's adapters are kept as *versions*, numbered from 1 in the order in which they were made. One of them
serves: requests and engines know no other, and its fields have the names that they had before there were versions.
"""

from __future__ import annotations

import secrets
from base64 import b32encode
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from operator import methodcaller
from typing import Any

import orjson

from adapters.recipe import UserAdapterId, bank_of
from server.errors import UserErased
from server.store.base import Store, corrupt_if_undecodable, decode, pairs
from server.store.profile_record import AdapterNote, Profile, decode_profile, encode_profile
from server.store.redis import keys
from server.store.redis.scripts import script
from server.store.redis.servers.base import WRITE_TIMEOUT_S

_BATCH = 100

_READ = script("adapters/read")
_ADD_MEMBER = script("adapters/add_member")
_SERVE = script("adapters/serve")


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """A user adapter: the recipe it was trained on, and its bytes as encoded by `adapters.user_adapter`."""

    id: str
    recipe: str
    sha256: str  # of the bytes, 64 hex digits
    raw: bytes


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """What is known of a kept adapter; None: it was made before versions were kept. Losses are as in `Job`."""

    note: AdapterNote
    sha256: str
    rank: int | None = None
    samples: int | None = None
    before: float | None = None
    after: float | None = None
    number: int = 0  # given when it is stored


@dataclass(frozen=True, slots=True)
class KeptVersions:
    """A user's kept adapters, of one moment."""

    record: bytes  # of the profile, which changes with the adapter that serves; empty for an unknown user
    profile: Profile | None
    versions: Sequence[AdapterVersion] = ()  # newest first
    serving: AdapterVersion | None = None
    chosen_ms: int = 0  # since when it serves, if it was chosen; 0 if it serves since it was trained

    def promotion(self, made: AdapterVersion, at_most: int) -> dict[str, Any]:
        """Return the `change` to a new version, for which the oldest make room: the one that serves goes last."""
        number = self.versions[0].number + 1 if self.versions else 1
        first_to_go = sorted(self.versions, key=lambda one: (one is self.serving, one.number))
        return self.change(replace(made, number=number), first_to_go[: max(0, len(first_to_go) + 1 - at_most)])

    def change(self, to: AdapterVersion, dropped: Sequence[AdapterVersion] = ()) -> dict[str, Any]:
        """Return what a script needs to let a version serve from now on, and to drop others."""
        left = None if self.serving in dropped else self.serving
        facts = {"to": orjson.dumps(to).decode(), "left": orjson.dumps(left).decode() if left else ""}
        return {"adapter": to.note.id, "dropped": [version.number for version in dropped], **facts}


def new_adapter_id() -> str:
    """Return 128 random bits as 26 base32 characters, the format that recipe names require."""
    return b32encode(secrets.token_bytes(16)).decode().rstrip("=").lower()


class AdapterStore(Store):
    """Stores user adapters."""

    async def adapter(self, adapter_id: UserAdapterId) -> StoredAdapter | None:
        """Return an adapter if it is still its user's current one."""
        fields = ("id", "recipe", "sha256", "raw")
        name = keys.adapter(adapter_id.user_key)
        # An adapter of a large model has megabytes, so reading one may take as long as a write.
        values = await self._connection.run(lambda redis: redis.hmget(name, fields), WRITE_TIMEOUT_S)
        if values[0] is None or values[0].decode() != adapter_id.id:
            return None
        return StoredAdapter(adapter_id.id, values[1].decode(), values[2].decode(), values[3])

    async def adapter_id(self, user_key: str) -> str | None:  # of the user's current adapter
        value = await self._connection.run(lambda redis: redis.hget(keys.adapter(user_key), "id"))
        return value.decode() if value is not None else None

    async def kept(self, user_key: str) -> KeptVersions:
        names = (keys.profile(user_key), keys.adapter(user_key))
        record, *flat = await self._connection.evaluate(_READ, names)
        fields = {name.decode(): value for name, value in pairs(flat).items()}
        with corrupt_if_undecodable():
            profile = decode_profile(record) if record else None
            note, serving = profile.adapter if profile else None, None
            noted = [decode(AdapterVersion, raw) for name, raw in fields.items() if name.startswith("facts:")]
            kept = [one for one in noted if f"raw:{one.number}" in fields]
            if note and fields.get("id") == note.id.encode():
                number = 1 + max((one.number for one in kept), default=0)  # of what a worker without versions promoted
                unnoted = AdapterVersion(note, fields["sha256"].decode(), number=number)
                serving = next((one for one in noted if one.note.id == note.id), unnoted)
                kept.append(serving)
            kept.sort(key=lambda one: -one.number)
            return KeptVersions(record, profile, kept, serving, int(fields.get("chosen_ms", 0)))

    async def serve(self, user_key: str, kept: KeptVersions, chosen: AdapterVersion) -> bool:
        """Let a kept version serve instead, and end the user's job if nobody asked for it, in one atomic step.

        Returns False if the user has changed since `found` was read. Raises `UserErased` if the user left the key.
        """
        assert kept.profile is not None
        bank = bank_of(chosen.note.recipe)
        await self.add_adapted(user_key, bank)
        names = (keys.profile(user_key), keys.adapter(user_key), keys.epoch(user_key), keys.jobs(user_key))
        record = encode_profile(replace(kept.profile, adapter=chosen.note))
        given = (orjson.dumps(kept.change(chosen)), kept.record, record, keys.job_prefix(user_key))
        done = await self._connection.write(_SERVE, names, *given)
        await self.settle_adapted(user_key, bank, written=done > 0)
        if done < 0:
            raise UserErased
        return bool(done)

    async def add_adapted(self, user_key: str, bank: str) -> None:
        """Add a user to a bank's set durably: in a cluster, a durable write to the user's keys does not cover it."""
        await self._connection.write(_ADD_MEMBER, (keys.BANKS,), bank)
        await self._connection.write(_ADD_MEMBER, (keys.adapted(bank),), user_key)

    async def banks(self) -> list[str]:
        """Return all banks (8 hex digits) that had queued users or trained user adapters."""
        banks = await self._connection.run(lambda redis: redis.smembers(keys.BANKS))
        return sorted(value.decode() for value in banks)

    async def adapted(self) -> dict[str, int]:
        """Return the number of users with an adapter, by the bank it was trained on."""
        banks = await self.banks()
        counts = [await self._connection.run(methodcaller("scard", keys.adapted(bank))) for bank in banks]
        return {bank: count for bank, count in zip(banks, counts, strict=True) if count}

    async def adapted_users(self, bank: str) -> AsyncIterator[str]:
        """Yield the keys of users whose adapter was trained on a bank. Some may have another adapter or none by now."""
        cursor = None
        while cursor != 0:
            scan = methodcaller("sscan", keys.adapted(bank), cursor or 0, count=_BATCH)
            cursor, members = await self._connection.run(scan)
            for member in members:
                yield member.decode()

    async def settle_adapted(self, user_key: str, bank: str, *, written: bool) -> None:
        """Leave the other banks' sets if an adapter of this bank was written, and all sets if the user is erased."""
        if written:
            await self.remove_adapted(user_key, except_bank=bank)
        elif not await self.has_jobs(user_key):
            await self.remove_adapted(user_key)

    async def has_jobs(self, user_key: str) -> bool:
        """Return whether a user has had jobs since they were last erased."""
        return bool(await self._connection.run(lambda redis: redis.exists(keys.jobs(user_key))))

    async def remove_adapted(self, user_key: str, *, except_bank: str = "") -> None:
        """Remove a user from every bank's set except that of `except_bank`."""
        for bank in await self.banks():
            if bank != except_bank:
                await self._connection.run(methodcaller("srem", keys.adapted(bank), user_key))
