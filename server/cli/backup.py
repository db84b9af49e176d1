"""`mta backup` and `mta restore`: copies of the store, and the way back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.errors import MtaError
from adapters.recipe import parse_recipe
from server.cli.keys import Data, store_settings, with_stores
from server.errors import Unavailable
from server.store.backup.folder import Entry, Manifest, delete_old_copies, open_copy, read_entries, user_of, write_copy
from server.store.tenants.user_key import UserKeys, check_values
from server.watching.audit import Act, note, read_audit

if TYPE_CHECKING:
    from rich.progress import Progress

    from server.store.opening import Stores  # commands start without redis-py

CLOCK_SKEW = timedelta(seconds=10)  # maximum difference between the clocks of gateways and of `mta backup`


def backup(
    out: Annotated[Path, typer.Option(help="Folder for copies; each is a folder in it, named by its time.")],
    keep_days: Annotated[
        int | None, typer.Option(help="Then delete copies in --out that are older.", show_default="keep all", min=1)
    ] = None,
    data: Data = None,
) -> None:
    """Copy the store while it is in use; `mta restore` brings the copy back.

    Every write acknowledged before the copy began is in it. The copy holds personal data, also of people who are erased
    later, so delete it in time. MTA_SECRET must be the gateways': the copy has only a hash of it. Banks are not in it.
    """
    from server.watching.background import lower_priority

    lower_priority()
    settings = store_settings(data)
    check_values(settings.user_secret)  # refused before the store is opened

    async def copy(stores: Stores) -> tuple[Path, Manifest]:
        copying, check_value = stores.copying, await stores.rotation.check()
        with _progress() as progress:
            task = progress.add_task("users", total=None)
            entries = copying.entries(lambda done, of: progress.update(task, completed=done, total=of))
            return await write_copy(out, entries, check_value, lambda: copying.version)

    folder, manifest = with_stores(settings, copy, checked=False)
    note(Act.BACKUP, "done", key="cli", copy=manifest.sha256[:12])
    typer.echo(f"{folder}: {manifest.users} users, {manifest.keys} keys, begun {manifest.began}")
    for old in delete_old_copies(out, keep_days) if keep_days else ():
        typer.echo(f"{old}: deleted, older than {keep_days} days")


def restore(
    copy: Annotated[Path, typer.Argument(help="Folder of one copy, from `mta backup`.")],
    erased: Annotated[
        list[Path] | None,
        typer.Option(help="Audit log (MTA_AUDIT) of a gateway or of commands since the copy; may be repeated."),
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
    if manifest.secret not in check_values(settings.user_secret):
        raise MtaError(f"the copy {copy} was made with another MTA_SECRET: its users could not be found with this one")
    gone, revoked, exchanged = _since(manifest, erased or [])
    if exchanged and len(check_values(settings.user_secret)) < 2:
        raise MtaError(
            "MTA_SECRET was exchanged since the copy: set `NEW,OLD`, so that whoever was erased is recognised"
        )
    moved = [UserKeys(settings.user_secret, tenant) for tenant in sorted(set(gone.values()))] if exchanged else []
    what = {"key": "cli", "copy": manifest.sha256[:12]}
    note(Act.RESTORE, "begun", **what)
    users, keys = with_stores(
        settings, lambda stores: _restore(stores, copy, manifest, gone, moved, revoked), checked=False
    )
    note(Act.RESTORE, "done", **what)
    typer.echo(
        f"restored: {users} users as of {manifest.began}; {manifest.users - users} who were erased since stay erased, "
        f"{keys} API keys stay revoked"
    )


def _since(manifest: Manifest, logs: Sequence[Path]) -> tuple[dict[str, str], set[str], bool]:
    """Return who was erased since a copy began (tenant, by user key), the ids of API keys revoked since, and whether
    MTA_SECRET was exchanged.

    An erasure that failed counts, since it may have been made; one of an unknown user does not.
    """
    gone: dict[str, str] = {}
    revoked, exchanged = set[str](), False
    begin = datetime.fromisoformat(manifest.began) - CLOCK_SKEW
    for path in logs:
        entries = list(read_audit(path.expanduser(), {}))
        since = [entry for entry in entries if datetime.fromisoformat(entry["time"]) >= begin]
        if len(since) == len(entries):
            typer.echo(f"{path} has no entry from before the copy: if there is an older log, give it as well", err=True)
        erasures = [entry for entry in since if entry["act"] == Act.ERASE and entry["outcome"] != "404"]
        gone |= {entry["user"]: entry["tenant"] for entry in erasures}
        revoked |= {entry["of_key"] for entry in since if entry["act"] == Act.KEY_REVOKED}
        exchanged |= any(entry["act"] == Act.SECRET_EXCHANGED for entry in since)
    return gone, revoked, exchanged


async def _restore(
    stores: Stores,
    copy: Path,
    manifest: Manifest,
    gone: dict[str, str],
    moved: Sequence[UserKeys],
    revoked: set[str],
) -> tuple[int, int]:
    """Restore a copy but for those who are gone; return the numbers of users and of API keys revoked again.

    `moved` are tenants of those whose key may have changed since.
    """
    from server.gateway.users.privacy import leave_shared_keys

    users = []

    def kept() -> Iterator[Entry]:
        for entry in read_entries(copy):
            user = user_of(entry)
            if user not in gone:
                users.extend([user] if user else [])
                yield entry

    await stores.copying.begin_restore(manifest.sha256)
    with _progress() as progress:
        task = progress.add_task("users", total=manifest.users)
        async for written in stores.copying.write(kept()):
            progress.update(task, completed=min(written, manifest.users))
        users = [user_key for user_key in users if not await _erase_if_gone(stores, user_key, gone, moved)]
        for user_key in progress.track(users, description="queues"):
            await _index(stores, user_key)
    for user_key, tenant in gone.items():
        await leave_shared_keys(stores, user_key, tenant)
    valid = [key for key in (await stores.keys.all()).keys if key.id in revoked and key.revoked_ms is None]
    for key in valid:
        await stores.keys.revoke(key.digest, time.time_ns() // 1_000_000)
    await stores.copying.end_restore()
    return len(users), len(valid)


async def _erase_if_gone(stores: Stores, user_key: str, gone: dict[str, str], moved: Sequence[UserKeys]) -> bool:
    """Erase a restored user who was erased under another key, which only the restored profile tells."""
    profile = None
    try:
        profile = await stores.profiles.load(user_key) if moved else None
    except Unavailable as error:
        if error.code != "store_corrupt":
            raise
    if profile is None:
        return False
    for users in moved:
        both = users.keys(profile.user_id)
        if user_key in both and not gone.keys().isdisjoint(both):
            rewrite = await stores.file.request_rewrite(user_key)
            await stores.profiles.erase(user_key, rewrite.erase_by_ms, rewrite.rewritten_by_ms)
            return True
    return False


async def _index(stores: Stores, user_key: str) -> None:
    """Add a user to sets and queues: those in the copy are as old as its beginning, and the user may be younger."""
    try:
        await stores.jobs.queue_again(user_key)
        profile = await stores.profiles.load(user_key)
    except Unavailable as error:
        if error.code != "store_corrupt":  # as it was before the copy
            raise
        profile = None
    if profile and profile.adapter:
        await stores.adapters.add_adapted(user_key, parse_recipe(profile.adapter.recipe).bank)
    if profile and profile.signature and not profile.is_signed(bank := profile.signature.signature.bank):
        await stores.signing(bank).add(user_key)


def _progress() -> Progress:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    return Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True))
