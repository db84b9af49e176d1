"""`mta secret`: exchange the secret that keys user ids."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated

import typer

from adapters.errors import MtaError
from server.cli.shared import Data, store_settings
from server.observability.audit import Act, note
from server.settings import Settings
from server.store.tenants.user_key import UserKeys, secrets_of

if TYPE_CHECKING:
    from server.store.rotation import Rotation, Sweep

SETTLE_S = 10.0  # a request that began before may still store somebody under the old secret
PAUSE_S = 1.0  # between two passes over the store

app = typer.Typer(help="The secret that keys user ids, MTA_SECRET.", no_args_is_help=True)


@app.command()
def rotate(
    tenant: Annotated[
        list[str] | None,
        typer.Option(
            help="Another tenant that has users; may be repeated.", show_default="those with a key, MTA_TENANT"
        ),
    ] = None,
    data: Data = None,
) -> None:
    """Move all users from the old secret in MTA_SECRET, `NEW,OLD`, to the new one, while requests run.

    Before, restart every gateway with both. To continue an interrupted run, run the command again. At the end it says
    whether OLD can be taken away.
    """
    settings = store_settings(data)
    if len(secrets_of(settings.user_secret)) < 2:
        raise MtaError("MTA_SECRET holds one secret: set `NEW,OLD`, restart every gateway with it, and then run this")
    from server.errors import Unavailable

    try:
        asyncio.run(_rotate(settings, tenant or []))
    except Unavailable as error:
        raise MtaError(f"{error.explained}. Run the command again: it goes on where it stopped") from error


async def _rotate(settings: Settings, tenants: list[str]) -> None:
    from server.store.feedback import NO_PROFILE_S
    from server.store.opening import open_stores
    from server.store.rotation import GRACE_MS

    async with open_stores(settings) as stores:
        rotation, ring = stores.rotation, await stores.keys.all()
        await rotation.check()
        names = sorted({settings.tenant, *tenants, *(key.tenant for key in ring.keys)})
        await rotation.begin()
        note(Act.SECRET_EXCHANGED, "begun", key="cli")
        unknown = await _move(rotation, [UserKeys(settings.user_secret, name) for name in names])
        if unknown:
            raise MtaError(
                f"{unknown} users belong to none of the tenants {', '.join(names)}, or their record cannot be "
                "read: keep OLD, and name their tenant with --tenant"
            )
        nameless = await rotation.let_nameless_expire()
        await rotation.end()
        note(Act.SECRET_EXCHANGED, "done", key="cli")
        typer.echo(
            f"nobody is left under the old secret: take OLD away from MTA_SECRET in {GRACE_MS // 60_000} minutes, and "
            "restart the gateways"
        )
        if nameless:
            typer.echo(
                f"people without a profile, of whom there are only ratings: {nameless}. Nothing says whose these are. "
                f"They expire within {NO_PROFILE_S // 86_400} days; until then an erasure finds them only with OLD"
            )


async def _move(rotation: Rotation, users: list[UserKeys]) -> int:
    """Sweep until nobody moves any more; return how many users cannot be moved."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    settled_s = time.monotonic() + SETTLE_S  # in every run: the one before may have stopped too early
    moved = 0
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("moving users")

        def show(sweep: Sweep) -> None:
            waits = f", {sweep.busy} when their training ends" if sweep.busy else ""
            progress.update(task, description=f"moving users: {moved + sweep.moved}{waits}")

        while True:
            is_last = time.monotonic() >= settled_s
            sweep = await rotation.sweep(users, show)
            moved += sweep.moved
            if is_last and not sweep.moved and not sweep.busy:
                break
            await asyncio.sleep(PAUSE_S)
    typer.echo(f"{moved} users moved to the new secret")
    return sweep.unknown
