"""Brings a copy back to an empty store, but for the people who were erased and the API keys revoked since it began.

A restore that was broken off is finished by another run, which may know of more erasures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

from adapters.errors import MtaError
from adapters.recipe import bank_of
from server.errors import Unavailable
from server.observability.audit import Act, read_audit
from server.store.backup.copying import Entry
from server.store.backup.folder import Manifest, has_data, open_copy, read_entries, user_of
from server.store.tenants.user_key import UserKeys, check_values

if TYPE_CHECKING:
    from server.store.opening import Stores  # commands start without the other stores

CLOCK_SKEW = timedelta(seconds=10)  # maximum difference between the clocks of gateways and of `mta backup`


@dataclass
class Since:
    """What audit logs say has happened since a copy began."""

    erased: dict[str, str] = field(default_factory=dict)  # tenant of everybody who was erased, by user key
    revoked: set[str] = field(default_factory=set)  # ids of API keys
    exchanged: bool = False  # whether MTA_SECRET was


def read_logs(manifest: Manifest, logs: Sequence[Path], warn: Callable[[str], None]) -> Since:
    """Read audit logs. Erasures that failed count, too, and those of unknown users, whom the store may have lost."""
    since, begin = Since(), datetime.fromisoformat(manifest.began) - CLOCK_SKEW
    for path in map(Path.expanduser, logs):
        files = sorted(path.glob("*.jsonl*")) if path.is_dir() else [path]
        if not files:
            raise MtaError(f"the folder {path} has no audit log: no file *.jsonl")
        entries = [entry for file in files for entry in read_audit(file, {})]
        new = [entry for entry in entries if datetime.fromisoformat(entry["time"]) >= begin]
        if len(new) == len(entries):
            warn(f"{path} has no entry from before the copy: if there is an older log, give it as well")
        for entry in new:
            if entry["act"] == Act.ERASE:
                since.erased[entry["user"]] = entry["tenant"]
            elif entry["act"] == Act.KEY_REVOKED:
                since.revoked.add(entry["of_key"])
            since.exchanged |= entry["act"] == Act.SECRET_EXCHANGED
    return since


@dataclass(frozen=True, slots=True)
class Restore:
    """A copy, and what has happened since it began."""

    copy: Path
    manifest: Manifest
    since: Since
    tenants: Sequence[UserKeys]  # whose users may have been erased under another key

    @classmethod
    def of(cls, copy: Path, logs: Sequence[Path], secret: str | None, warn: Callable[[str], None]) -> Self:
        """Read a copy and the audit logs since; MtaError if its users could not be found by `secret`, MTA_SECRET."""
        manifest, secrets = open_copy(copy), check_values(secret)
        if manifest.secret and manifest.secret not in secrets:
            raise MtaError(
                f"the copy {copy} was made with another MTA_SECRET: its users could not be found with this one"
            )
        since = read_logs(manifest, logs, warn)
        if since.exchanged and len(secrets) < 2:
            raise MtaError(
                "MTA_SECRET was exchanged since the copy: set `NEW,OLD`, so that whoever was erased is recognised"
            )
        names = sorted(set(since.erased.values())) if len(secrets) > 1 else ()
        return cls(copy, manifest, since, [UserKeys(secret, name) for name in names])

    async def run(self, stores: Stores, progress: Callable[[str, int, int], None]) -> tuple[int, int]:
        """Write the copy to the stores; return the numbers of users, and of API keys that were revoked again.

        `progress` gets a phase, and the numbers of users done and of all.
        """
        if await stores.copying.begin_restore(self.manifest.sha256):  # an earlier run may not have had all logs
            for user_key in self.since.erased:
                await _erase(stores, user_key)
        kept = await self._write(stores, progress)
        users = 0
        for done, user_key in enumerate(kept, 1):
            users += await self.settle(stores, user_key)
            progress("queues", done, len(kept))
        for user_key, tenant in self.since.erased.items():
            await stores.leave_shared_keys(user_key, tenant)
        revoked = await self._revoke(stores)
        await stores.copying.note_copy(self.manifest.began_s)
        await stores.copying.end_restore()
        return users, revoked

    async def _write(self, stores: Stores, progress: Callable[[str, int, int], None]) -> list[str]:
        """Write all entries but those of erased people, and return the keys of the users who have data."""
        users: list[str] = []

        def kept() -> Iterator[Entry]:
            for entry in read_entries(self.copy):
                user = user_of(entry)
                if user not in self.since.erased:
                    if user and has_data(entry):
                        users.append(user)
                    yield entry

        async for written in stores.copying.write(kept()):
            progress("users", min(written, self.manifest.users), self.manifest.users)
        return users

    async def settle(self, stores: Stores, user_key: str) -> bool:
        """Add a restored user to sets and queues: the copied ones are as old as the copy's beginning, users younger.

        Erase the user instead, and return False, if they were erased under another key, which only the profile tells.
        """
        try:
            profile = await stores.profiles.load(user_key)
            if profile and (tenant := self._erased_elsewhere(user_key, profile.user_id)):
                await _erase(stores, user_key)
                self.since.erased[user_key] = tenant
                return False
            await stores.jobs.queue_again(user_key)
        except Unavailable as error:
            if error.code != "store_corrupt":  # as it was before the copy
                raise
            return True
        if profile and profile.adapter:
            await stores.adapters.add_adapted(user_key, bank_of(profile.adapter.recipe))
        if profile and profile.signature and not profile.is_signed(bank := profile.signature.signature.bank):
            await stores.signing(bank).add(user_key)
        return True

    def _erased_elsewhere(self, user_key: str, user_id: str) -> str | None:
        """Return the tenant of a user who was erased under their key by another secret, or None."""
        of_tenants = [both for users in self.tenants if user_key in (both := users.keys(user_id))]
        return next((self.since.erased[key] for both in of_tenants for key in both if key in self.since.erased), None)

    async def _revoke(self, stores: Stores) -> int:
        ring = await stores.keys.all()
        valid = [key for key in ring.keys if key.id in self.since.revoked and key.revoked_ms is None]
        for key in valid:
            await stores.keys.revoke(key.digest, time.time_ns() // 1_000_000)
        return len(valid)


async def _erase(stores: Stores, user_key: str) -> None:
    rewrite = await stores.file.announce(user_key)
    await stores.profiles.erase(user_key, rewrite.erase_by_ms, rewrite.rewritten_by_ms)
