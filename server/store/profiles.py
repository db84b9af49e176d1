"""Profiles: a user's record, items, vectors and epoch (keys: `server/store/redis/keys.py`).

A request needs only the record; items and vectors are needed for changes. A commit succeeds only if the record has not
changed since it was read.

Erasing a user starts a new *epoch*, which the tombstone keeps. Each write names the epoch it saw at its start and is
refused if the epoch has changed, so writes in progress store nothing of an erased user. For an unknown user, an erasure
leaves nothing behind. Therefore a write to one begins by leaving a *mark* that expires, a random number. An erasure
removes it, and what is written later demands it: whatever loses a mark, such as a failover, a write is refused then.

A user who moved to the key of another secret leaves the epoch `><new key> <epoch>` (`rotation.py`), which refuses every
write.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from operator import methodcaller

from server.errors import Unavailable, UserErased
from server.store.append_only_file import AppendOnlyFile
from server.store.base import Store, corrupt_if_undecodable, pairs
from server.store.jobs import KEPT_JOBS
from server.store.profile_record import (
    Profile,
    StoredItem,
    StoredVector,
    decode_item,
    decode_profile,
    decode_vector,
    encode_item,
    encode_profile,
    encode_vector,
)
from server.store.redis import keys
from server.store.redis.scripts import script
from server.store.redis.servers.base import WRITE_TIMEOUT_S
from server.store.tenants.holdings import Held
from server.store.tenants.user_key import User

TOMBSTONE_S = 7 * 24 * 3600
MARK_S = 3600  # longer than a write waits for its body, its places and the embedder: one that outlasts it is refused
PASSING_S = 24 * 3600  # longest life of texts that are not kept, if no worker is done with them before
LATE = "erased_late"  # error code: something is stored, and the deadline for its erasure has passed
# COMMANDLOG exists from Valkey 8.1 on.
_CLEAR_LOGS = ("SLOWLOG RESET", "COMMANDLOG RESET large-request", "COMMANDLOG RESET large-reply")

_COMMIT = script("profiles/commit")
_BEGIN = script("profiles/begin")
_ERASE = script("profiles/erase", runs_when_full=True)
_WRITE_AGAIN = script("profiles/write_again")

_LOAD = script("profiles/load")

_READ = script("profiles/read")
_MEASURE = script("profiles/measure")


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A consistent copy of a user's profile, items and vectors."""

    version: bytes  # record that `commit` compares; empty for an unknown user
    epoch: str  # id of the user's last erasure; empty if none is kept. It holds no mark
    profile: Profile | None  # None for an unknown user
    items: Mapping[str, StoredItem]  # by id, oldest first
    vectors: Mapping[str, StoredVector]  # by item id; may be incomplete


@dataclass(frozen=True, slots=True)
class Change:
    """One commit: the new record, new or changed items and vectors by item id, and ids to remove first."""

    profile: Profile
    put_items: Mapping[str, StoredItem]
    put_vectors: Mapping[str, StoredVector]
    drop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Erased:
    """Numbers of removed objects; `keys` counts Redis keys of all kinds."""

    items: int
    samples: int
    jobs: int
    adapters: int
    keys: int
    feedback: int


@dataclass(frozen=True, slots=True)
class Erasure:
    """An erasure as kept in the tombstone."""

    erased: Erased
    rewritten_by_ms: int  # latest time at which the data is gone from disk too, Unix time
    banks: tuple[str, ...] = ()  # banks (8 hex digits) of the removed jobs


class ProfileStore(Store):
    """Stores profiles, by user key."""

    async def load(self, key: str) -> Profile | None:
        record = await self._connection.run(lambda redis: redis.get(keys.profile(key)))
        with corrupt_if_undecodable():
            return decode_profile(record) if record else None

    async def read(self, key: str) -> Snapshot:
        names = (*_names(key), keys.epoch(key))
        answer = await self._connection.evaluate(_READ, names, timeout_s=WRITE_TIMEOUT_S)
        record, raw_items, raw_vectors, epoch = answer
        with corrupt_if_undecodable():
            return Snapshot(
                version=record or b"",
                epoch=split_epoch(epoch)[1],
                profile=decode_profile(record) if record else None,
                items=_in_order(pairs(raw_items)),
                vectors={name.decode(): decode_vector(raw) for name, raw in pairs(raw_vectors).items()},
            )

    async def find(self, user: User) -> tuple[User, Profile | None, str]:
        """Return the user with the key they are stored under, the profile and the epoch, of one moment."""
        profile, _, epoch = await self.state(user.key)
        for other in user.keys:
            if profile or other == user.key:
                continue
            profile, moved_to, others_epoch = await self.state(other)
            if profile or moved_to != user.key:
                # Who is under neither key comes back under the first, whose tombstone may outlast the other's.
                return replace(user, key=other), profile, others_epoch or ("" if profile else epoch)
            profile, _, epoch = await self.state(user.key)  # the user may have moved since it was read first
        return user, profile, epoch

    async def state(self, key: str) -> tuple[Profile | None, str, str]:
        """Return the profile, the key that the user moved to, and the epoch; the latter are empty if there is none."""
        record, epoch = await self._connection.evaluate(_LOAD, (keys.profile(key), keys.epoch(key)))
        with corrupt_if_undecodable():
            return decode_profile(record) if record else None, *split_epoch(epoch)

    async def moved_to(self, key: str) -> str:
        """Return the key that the user moved to; empty if they did not."""
        return (await self.state(key))[1]

    async def items(self, key: str) -> Mapping[str, StoredItem]:
        """Return the items by id, oldest first; empty for an unknown user."""
        raw_items = await self._connection.run(lambda redis: redis.hgetall(keys.items(key)), WRITE_TIMEOUT_S)
        with corrupt_if_undecodable():
            return _in_order(raw_items)

    async def begin(self, key: str) -> str:
        """Return the user's epoch for a write that begins now; an unknown user gets a mark, which is part of it.

        This need not be durable: without its mark, the write is refused. Raises `UserErased` if the user left the key.
        """
        if (epoch := await self.leave_mark(key)).startswith(">"):
            raise UserErased
        return epoch

    async def leave_mark(self, key: str) -> str:
        """Do as `begin`, also at a key that the user has left."""
        names, mark = (keys.profile(key), keys.epoch(key)), secrets.token_hex(8)
        epoch: bytes = await self._connection.evaluate(_BEGIN, names, mark, MARK_S, timeout_s=WRITE_TIMEOUT_S)
        return epoch.decode()

    async def commit(self, key: str, version: bytes, change: Change, epoch: str = "") -> bool:
        """Write a change of the snapshot of `version`. Return True once it is on disk, False if the user has changed.

        Raises `UserErased` if the user was erased since `epoch`, the user's epoch when work on the change began, and if
        the user is unknown and it has no mark.
        """
        items = {name: encode_item(item) for name, item in change.put_items.items()}
        vectors = {name: encode_vector(vector) for name, vector in change.put_vectors.items()}
        puts = list(dict.fromkeys((*items, *vectors)))
        stays_s = 0 if change.profile.keeps_texts else PASSING_S
        arguments = [version, encode_profile(change.profile), epoch, stays_s, len(puts)]
        for name in puts:
            arguments += [name, items.get(name, b""), vectors.get(name, b"")]
        names = (*_names(key), keys.epoch(key), keys.feedback(key), keys.samples(key), keys.learned(key))
        if stays_s and items:
            await AppendOnlyFile(self._connection).announce(key, stays_s * 1000)
        written = await self._connection.write(_COMMIT, names, *arguments, *change.drop)
        if written < 0:
            raise UserErased
        return bool(written)

    async def wait_until_durable(self, key: str) -> None:
        """Wait until the state that `read` returned is durable: it may include writes that are not yet on disk."""
        if not self._connection.reads_are_durable:
            await self._connection.write(_WRITE_AGAIN, (keys.profile(key),))

    async def is_stored(self, key: str) -> bool:
        """Return whether anything is stored about a user, besides a tombstone."""
        return bool(await self._connection.run(methodcaller("exists", *keys.of_user(key)[:-1])))

    async def erase(self, key: str, deadline_ms: int, rewritten_by_ms: int, epoch: str = "") -> Erasure | None:
        """Remove everything stored about a user; the removal is on disk when this returns.

        `epoch` is a new one, random if empty. Returns the erasure; if nothing was stored, the last kept one; None for
        an unknown user, of whom nothing is kept. Also raises `Unavailable` if something is stored and the store's clock
        is past `deadline_ms`, Unix time.
        """
        epoch = epoch or secrets.token_hex(8)
        arguments = (keys.job_prefix(key), KEPT_JOBS, TOMBSTONE_S, epoch, deadline_ms, rewritten_by_ms)
        answer = await self._connection.write(_ERASE, keys.of_user(key), *arguments)
        if not answer:
            raise Unavailable("the store took too long to erase the user: send the request again", code=LATE)
        rewritten_by, banks, *counts = answer
        if rewritten_by is None or banks is None:
            return None
        await self._clear_command_logs()
        erased = Erased(*(int(count or 0) for count in counts))
        return Erasure(erased, int(rewritten_by), tuple(sorted(set(banks.decode().split()))))

    async def _clear_command_logs(self) -> None:
        """Clear the command logs of all servers, which contain user texts. Refusals are ignored."""
        with suppress(Unavailable):
            asked = [(server, command) for server in await self._connection.members() for command in _CLEAR_LOGS]
            await asyncio.gather(*(self._connection.send(*one) for one in asked), return_exceptions=True)

    async def measure(self, key: str) -> tuple[bytes, Held, bool]:
        """Return a user's record, empty if there is no profile, what they hold, and whether they have an open job."""
        of_user = (keys.samples, keys.feedback, keys.learned, keys.adapter, keys.jobs)
        names = (*_names(key), *(name(key) for name in of_user))
        record, size_bytes, adapters, trains = await self._connection.evaluate(_MEASURE, names, keys.job_prefix(key))
        held = Held(people=size_bytes > 0, bytes=size_bytes, adapters=max(adapters, trains))
        return record or b"", held, bool(trains)


def split_epoch(epoch: bytes | None) -> tuple[str, str]:
    """Return the key that a user moved to, if any, and the epoch in which that was."""
    text = (epoch or b"").decode()
    moved_to, _, before = text.removeprefix(">").partition(" ") if text.startswith(">") else ("", "", text)
    return moved_to, before


def _in_order(raw_items: Mapping[bytes, bytes]) -> dict[str, StoredItem]:
    decoded = ((name.decode(), decode_item(raw)) for name, raw in raw_items.items())
    return dict(sorted(decoded, key=lambda pair: pair[1].order))


def _names(key: str) -> tuple[str, str, str]:
    return keys.profile(key), keys.items(key), keys.vectors(key)
