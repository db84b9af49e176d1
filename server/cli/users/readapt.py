"""`mta readapt`: after a change of bank, train the user adapters of the old one again."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from server.settings import Settings
    from server.store.tenants.access_keys import KeyRing
    from server.worker.readapting import ServedBanks


def readapt(
    bank: Annotated[
        Path | None, typer.Option(help="Folder of the bank that is served now.", show_default="MTA_BANK")
    ] = None,
    redis_url: Annotated[str | None, typer.Option(help="URL of Redis or Valkey.", show_default="MTA_REDIS_URL")] = None,
    at_a_time: Annotated[int, typer.Option(help="Most jobs open at a time.", min=1)] = 4,
) -> None:
    """Make a job for every user whose adapter belongs to an old bank, from their stored samples; workers train them.

    If it is interrupted, run it again: it continues where it stopped. Users are served merged until they are adapted.
    Where tenants name banks (`mta keys bank`), users whom another bank serves are left alone; MTA_SECRET, the gateways'
    own, tells whose users they are. For a tenant's bank give --bank, and leave MTA_BANK as the gateways have it.
    """
    from server.settings import load_settings

    asyncio.run(_run(load_settings(bank=bank, redis_url=redis_url), load_settings().bank, at_a_time))


async def _run(settings: Settings, usual: Path | None, at_a_time: int) -> None:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from bank.manifest import read_manifest
    from server.store.opening import open_stores
    from server.store.samples import JobBudget
    from server.worker.readapting import Readapting, ReadaptTally

    manifest = read_manifest(settings.bank_folder())
    async with open_stores(settings) as stores:
        budget = JobBudget(settings.job_tokens, settings.job_seconds)
        ring = await stores.keys.all()
        work = Readapting(
            stores.jobs,
            stores.adapters,
            stores.profiles,
            manifest=manifest,
            at_a_time=at_a_time,
            budget=budget,
            served=_served(settings, ring, manifest.short, usual) if ring.banks else None,
        )
        stale = await work.stale()
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
            task = progress.add_task("users", total=sum(stale.values()))

            def on_user(tally: ReadaptTally) -> None:
                progress.update(task, completed=tally.queued + tally.settled + tally.waiting)

            tally = await work.run(on_user)
    Console(highlight=False).print(
        f"bank {manifest.short}: {tally.queued} users have a job, {tally.settled} need none, "
        f"{tally.waiting} wait for a request to remake their profile"
    )


def _served(settings: Settings, ring: KeyRing, bank: str, usual: Path | None) -> ServedBanks:
    """Which bank serves whom, where `bank` is to be trained for and MTA_BANK is the folder `usual`.

    Tenants that name no bank have `bank` too, unless it is a tenant's and not the usual one.
    """
    from bank.manifest import read_manifest
    from server.store.tenants.user_key import Tenants
    from server.worker.readapting import ServedBanks

    own = bank
    if bank in ring.banks.values():
        own = read_manifest(usual).short if usual else ""
    secret = settings.secret.get_secret_value() if settings.secret else None
    return ServedBanks(ring, own, Tenants(secret, settings.tenant), settings.tenant)
