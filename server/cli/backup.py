"""`mta backup` and `mta restore`: copies of the store, and the way back."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.errors import MtaError
from adapters.recipe import parse_recipe
from server.cli.keys import Data, store_settings, with_stores
from server.errors import Unavailable
from server.store.backup.folder import CopyWriter, Entry, Manifest, delete_old_copies, open_copy, read_entries, user_of
from server.store.tenants.user_key import UserKeys
from server.watching.audit import Act, note, read_audit

if TYPE_CHECKING:
    from rich.progress import Progress

    from server.settings import Settings
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
    settings = store_settings(data)
    check_value = _check_value(settings)

    async def copy(stores: Stores) -> Manifest:
        writer = CopyWriter(out)
        try:
            with _progress() as progress:
                task = progress.add_task("users", total=None)
                show = lambda done, total: progress.update(task, completed=done, total=total)  # noqa: E731
                async for entry in stores.copying.entries(show):
                    writer.add(entry)
            manifest = writer.finish(check_value, stores.copying.version)
        except BaseException:
            writer.discard()
            raise
        typer.echo(f"{writer.folder}: {manifest.users} users, {manifest.keys} keys, begun {manifest.began}")
        return manifest

    with _noted(Act.BACKUP) as what:
        what["copy"] = with_stores(settings, copy, checked=False).sha256[:12]
    for folder in delete_old_copies(out, keep_days) if keep_days else ():
        typer.echo(f"{folder}: deleted, older than {keep_days} days")


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
        raise MtaError(
            f"{'either' if erased else 'name the audit logs since the copy with'} --erased FILE"
            f"{' or' if erased else ', or bring everybody back with'} --without-erasures"
        )
    settings = store_settings(data)
    manifest = open_copy(copy)
    if manifest.secret != _check_value(settings):
        raise MtaError(f"the copy {copy} was made with another MTA_SECRET: its users could not be found with this one")
    since = _since(manifest, erased or [])

    with _noted(Act.RESTORE, copy=manifest.sha256[:12]):
        write = partial(_restore, copy=copy, manifest=manifest, since=since)
        users, revoked = with_stores(settings, write, checked=False)
    gone = f"{manifest.users - users} who were erased since stay erased, {revoked} API keys stay revoked"
    typer.echo(f"restored: {users} users as of {manifest.began}; {gone}")
    for act, count in since.lost.items():
        typer.echo(f"since the copy, and not in it: {act}, {count} times. Do it again", err=True)


@dataclass
class _Since:
    """What audit logs say has happened since a copy began."""

    erased: dict[str, str] = field(default_factory=dict)  # tenant, by user key
    revoked: set[str] = field(default_factory=set)  # ids of API keys
    lost: Counter[str] = field(default_factory=Counter)  # acts that a restore undoes


def _since(manifest: Manifest, logs: Sequence[Path]) -> _Since:
    """Read audit logs. An erasure that failed counts, since it may have been made; one of an unknown user does not."""
    since, begin = _Since(), datetime.fromisoformat(manifest.began) - CLOCK_SKEW
    for path in logs:
        entries = list(read_audit(path.expanduser(), {}))
        if all(datetime.fromisoformat(entry["time"]) > begin for entry in entries):
            typer.echo(f"{path} has no entry from before the copy: if there is an older log, give it as well", err=True)
        for entry in entries:
            if datetime.fromisoformat(entry["time"]) < begin:
                continue
            if entry["act"] == Act.ERASE and entry["outcome"] != "404":
                since.erased[entry["user"]] = entry["tenant"]
            elif entry["act"] == Act.KEY_REVOKED:
                since.revoked.add(entry["of_key"])
            elif entry["act"] in (Act.KEY_CREATED, Act.BANK_CHOSEN):
                since.lost[entry["act"]] += 1
    return since


async def _restore(stores: Stores, *, copy: Path, manifest: Manifest, since: _Since) -> tuple[int, int]:
    """Restore a copy, and return the numbers of users and of API keys that are revoked again."""
    from server.gateway.users.privacy import leave_shared_keys

    users = []

    def kept() -> Iterator[Entry]:
        for entry in read_entries(copy):
            user = user_of(entry)
            if user not in since.erased:
                users.extend([user] if user else [])
                yield entry

    await stores.copying.begin_restore(manifest.sha256)
    with _progress() as progress:
        task = progress.add_task("users", total=manifest.users)
        async for written in stores.copying.write(kept()):
            progress.update(task, completed=min(written, manifest.users))
        for user_key in progress.track(users, description="queues"):
            await _index(stores, user_key)
    for user_key, tenant in since.erased.items():
        await leave_shared_keys(stores, user_key, tenant)
    valid = [key for key in (await stores.keys.all()).keys if key.id in since.revoked and key.revoked_ms is None]
    for key in valid:
        await stores.keys.revoke(key.digest, time.time_ns() // 1_000_000)
    await stores.copying.end_restore()
    return len(users), len(valid)


async def _index(stores: Stores, user_key: str) -> None:
    """Add a user to sets and queues: those in the copy are as old as its beginning, and the user may be younger."""
    try:
        await stores.jobs.queue_again(user_key)
        profile = await stores.profiles.load(user_key)
    except Unavailable as error:
        if error.code != "store_corrupt":
            raise
        typer.echo(f"{user_key}: {error.message}", err=True)  # as before the copy
        return
    if profile and profile.adapter:
        await stores.adapters.add_adapted(user_key, parse_recipe(profile.adapter.recipe).bank)
    if profile and profile.signature and not profile.is_signed(bank := profile.signature.signature.bank):
        await stores.signing(bank).add(user_key)


@contextmanager
def _noted(act: Act, **what: str) -> Iterator[dict[str, str]]:
    """Note an act in the audit log, with what the block adds to the yielded fields."""
    try:
        yield what
    except MtaError:
        note(act, "failed", key="cli", **what)
        raise
    note(act, "done", key="cli", **what)


def _check_value(settings: Settings) -> str:
    return UserKeys(settings.secret.get_secret_value() if settings.secret else None, settings.tenant).check_value


def _progress() -> Progress:
    from rich.progress import MofNCompleteColumn, Progress

    return Progress(*Progress.get_default_columns(), MofNCompleteColumn(), transient=True)
