"""`mta backup` and `mta restore`: copies of the store, and the way back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.errors import MtaError
from adapters.recipe import parse_recipe
from server.cli.shared import MOST_DAYS, Data, store_settings, with_stores
from server.errors import Unavailable
from server.store.backup.copying import Entry
from server.store.backup.folder import (
    Manifest,
    delete_old_copies,
    has_data,
    open_copy,
    read_entries,
    user_of,
    write_copy,
)
from server.store.tenants.user_key import UserKeys, check_values
from server.watching.audit import Act, note, read_audit

if TYPE_CHECKING:
    from server.store.opening import Stores  # commands start without redis-py

CLOCK_SKEW = timedelta(seconds=10)  # maximum difference between the clocks of gateways and of `mta backup`


def backup(
    out: Annotated[Path, typer.Option(help="Folder for copies; each is a folder in it, named by its time.")],
    keep_days: Annotated[
        int | None,
        typer.Option(help="Then delete copies in --out that are older.", show_default="keep all", min=1, max=MOST_DAYS),
    ] = None,
    data: Data = None,
) -> None:
    """Copy the store while it is in use; `mta restore` brings the copy back.

    Every write acknowledged before the copy began is in it. The copy holds personal data, also of people who are erased
    later, so delete it in time. MTA_SECRET is not in it and not needed; neither are banks, which are files.
    """
    from server.cli.progress import ConsoleProgress
    from server.watching.background import lower_priority

    lower_priority()

    async def copy(stores: Stores) -> tuple[Path, Manifest]:
        with ConsoleProgress() as progress:
            folder, manifest = await write_copy(out, stores.copying, partial(progress.piece, "users"))
        try:
            await stores.copying.note_copy(manifest.began_s)
        except Unavailable as error:  # the store is full
            typer.echo(f"the copy is complete, but the store could not note its time: {error}", err=True)
        return folder, manifest

    try:
        folder, manifest = with_stores(store_settings(data), copy, checked=False)
        note(Act.BACKUP, "done", key="cli", copy=manifest.sha256[:12])
        typer.echo(f"{folder}: {manifest.users} users, {manifest.keys} keys, begun {manifest.began}")
    finally:  # a full disk would stay full, and people who were erased have to leave the copies in time
        for old in delete_old_copies(out, keep_days) if keep_days else ():
            typer.echo(f"{old}: deleted, older than {keep_days} days")


def restore(
    copy: Annotated[Path, typer.Argument(help="Folder of one copy, from `mta backup`.")],
    erased: Annotated[
        list[Path] | None,
        typer.Option(help="Audit log (MTA_AUDIT) of a gateway or of commands since the copy, or a folder of them."),
    ] = None,
    without_erasures: Annotated[
        bool, typer.Option("--without-erasures", help="Bring back people who were erased since the copy, too.")
    ] = False,
    data: Data = None,
) -> None:
    """Restore a copy to an empty store, which may be of another kind or size.

    The audit logs name the people who were erased since the copy, who stay erased, and the API keys that were revoked,
    which stay revoked. Until the restore has ended, gateways and workers do not start on the store, and gateways that
    run are not ready. To finish a restore that was broken off, run the command again.
    """
    if bool(erased) == without_erasures:
        raise MtaError("name the audit logs since the copy with --erased FILE, or else give --without-erasures")
    settings = store_settings(data)
    manifest = open_copy(copy)
    secrets = check_values(settings.user_secret)
    if manifest.secret and manifest.secret not in secrets:
        raise MtaError(f"the copy {copy} was made with another MTA_SECRET: its users could not be found with this one")
    since = _read_logs(manifest, erased or [])
    if since.exchanged and len(secrets) < 2:
        raise MtaError(
            "MTA_SECRET was exchanged since the copy: set `NEW,OLD`, so that whoever was erased is recognised"
        )
    tenants = [UserKeys(settings.user_secret, tenant) for tenant in sorted(set(since.gone.values()))]
    what = {"key": "cli", "copy": manifest.sha256[:12]}
    note(Act.RESTORE, "begun", **what)
    work = partial(_restore, copy=copy, manifest=manifest, since=since, tenants=tenants if len(secrets) > 1 else ())
    users, keys = with_stores(settings, work, checked=False)
    note(Act.RESTORE, "done", **what)
    typer.echo(
        f"restored: {users} users as of {manifest.began}; {manifest.users - users} who were erased since stay erased, "
        f"{keys} API keys stay revoked"
    )


@dataclass
class _Since:
    """What audit logs say has happened since a copy began."""

    gone: dict[str, str] = field(default_factory=dict)  # tenant of everybody who was erased, by user key
    revoked: set[str] = field(default_factory=set)  # ids of API keys
    exchanged: bool = False  # whether MTA_SECRET was


def _read_logs(manifest: Manifest, logs: Sequence[Path]) -> _Since:
    """Read audit logs. Erasures that failed count, too, and those of unknown users, whom the store may have lost."""
    found, begin = _Since(), datetime.fromisoformat(manifest.began) - CLOCK_SKEW
    for path in map(Path.expanduser, logs):
        files = sorted(path.glob("*.jsonl*")) if path.is_dir() else [path]
        if not files:
            raise MtaError(f"the folder {path} has no audit log: no file *.jsonl")
        entries = [entry for file in files for entry in read_audit(file, {})]
        since = [entry for entry in entries if datetime.fromisoformat(entry["time"]) >= begin]
        if len(since) == len(entries):
            typer.echo(f"{path} has no entry from before the copy: if there is an older log, give it as well", err=True)
        for entry in since:
            if entry["act"] == Act.ERASE:
                found.gone[entry["user"]] = entry["tenant"]
            elif entry["act"] == Act.KEY_REVOKED:
                found.revoked.add(entry["of_key"])
            found.exchanged |= entry["act"] == Act.SECRET_EXCHANGED
    return found


async def _restore(
    stores: Stores, *, copy: Path, manifest: Manifest, since: _Since, tenants: Sequence[UserKeys]
) -> tuple[int, int]:
    """Restore a copy but for those who are gone; return the numbers of users and of API keys revoked again.

    `tenants` are those whose users may have been erased under another key.
    """
    from server.cli.progress import ConsoleProgress
    from server.gateway.users.privacy import leave_shared_keys

    users: list[str] = []
    left = 0

    def kept() -> Iterator[Entry]:
        for entry in read_entries(copy):
            user = user_of(entry)
            if user not in since.gone:
                if user and has_data(entry):
                    users.append(user)
                yield entry

    if await stores.copying.begin_restore(manifest.sha256):  # perhaps an earlier run did not have all logs
        for user_key in since.gone:
            await _erase(stores, user_key)
    with ConsoleProgress() as progress:
        async for written in stores.copying.write(kept()):
            progress.piece("users", min(written, manifest.users), manifest.users)
        for done, user_key in enumerate(users, 1):
            left += await _settle(stores, user_key, since.gone, tenants)
            progress.piece("queues", done, len(users))
    for user_key, tenant in since.gone.items():
        await leave_shared_keys(stores, user_key, tenant)
    valid = [key for key in (await stores.keys.all()).keys if key.id in since.revoked and key.revoked_ms is None]
    for key in valid:
        await stores.keys.revoke(key.digest, time.time_ns() // 1_000_000)
    await stores.copying.note_copy(manifest.began_s)
    await stores.copying.end_restore()
    return left, len(valid)


async def _settle(stores: Stores, user_key: str, gone: dict[str, str], tenants: Sequence[UserKeys]) -> bool:
    """Add a restored user to sets and queues: those in the copy are as old as its beginning, the user may be younger.

    Erase the user instead, add them to `gone` and return False, if they were erased under another key, which only the
    profile tells.
    """
    try:
        profile = await stores.profiles.load(user_key)
        for both in (users.keys(profile.user_id) for users in tenants if profile):
            if user_key in both and (erased := [key for key in both if key in gone]):
                await _erase(stores, user_key)
                gone[user_key] = gone[erased[0]]
                return False
        await stores.jobs.queue_again(user_key)
    except Unavailable as error:
        if error.code != "store_corrupt":  # as it was before the copy
            raise
        return True
    if profile is None:
        return True
    if profile.adapter:
        await stores.adapters.add_adapted(user_key, parse_recipe(profile.adapter.recipe).bank)
    if profile.signature and not profile.is_signed(bank := profile.signature.signature.bank):
        await stores.signing(bank).add(user_key)
    return True


async def _erase(stores: Stores, user_key: str) -> None:
    rewrite = await stores.file.announce(user_key)
    await stores.profiles.erase(user_key, rewrite.erase_by_ms, rewrite.rewritten_by_ms)
