"""`mta backup` and `mta restore`: copies of the store, and the way back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.errors import MtaError
from server.cli.shared import MOST_DAYS, Data, store_settings, with_stores
from server.errors import Unavailable
from server.observability.audit import Act, note
from server.store.backup.folder import Manifest, delete_old_copies, write_copy
from server.store.backup.restoring import Restore

if TYPE_CHECKING:
    from server.store.opening import Stores  # commands start without redis-py


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
    from server.observability.background import lower_priority

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
    from server.cli.progress import ConsoleProgress

    settings = store_settings(data)
    work = Restore.of(copy, erased or [], settings.user_secret, partial(typer.echo, err=True))
    manifest = work.manifest

    async def run(stores: Stores) -> tuple[int, int]:
        with ConsoleProgress() as progress:
            return await work.run(stores, progress.piece)

    what = {"key": "cli", "copy": manifest.sha256[:12]}
    note(Act.RESTORE, "begun", **what)
    users, keys = with_stores(settings, run, checked=False)
    note(Act.RESTORE, "done", **what)
    typer.echo(
        f"restored: {users} users as of {manifest.began}; {manifest.users - users} who were erased since stay erased, "
        f"{keys} API keys stay revoked"
    )
