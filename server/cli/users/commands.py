"""`mta users`: profiles into a gateway from a file, and what it stores of a person; and `mta readapt`."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from adapters.errors import MtaError

if TYPE_CHECKING:
    from mta_client import Client
    from server.settings import Settings

T = TypeVar("T")

app = typer.Typer(help="People's profiles, over a gateway's HTTP API.", no_args_is_help=True)

Url = Annotated[str | None, typer.Option(help="URL of the gateway.", show_default="http://127.0.0.1, at MTA_PORT")]
UserId = Annotated[str, typer.Argument(help="The id that the app gives the user.", metavar="ID")]

_SHORT_PATIENCE_S = 5.0


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="LaMP's per-user layout, or newline-delimited JSON.")],
    url: Url = None,
    at_a_time: Annotated[int, typer.Option(help="Most requests in flight.", min=1, max=64)] = 4,
    state: Annotated[
        Path | None, typer.Option(help="What is done, by hash.", show_default="FILE.imported, beside it")
    ] = None,
) -> None:
    """Write the profile of everybody in FILE: `{"user_id": …, "profile": [items]}`, a list of them or one per line.

    An item is an object with the fields of the bank's task, or a text. A person's history is replaced. If it is
    interrupted, run it again: it continues where it stopped. Whoever cannot be imported is in FILE.failed.ndjson with
    the reason, and the exit status is 1. While the gateway is busy or away, it waits, up to five minutes.
    """
    from server.cli.bank.progress import ConsoleProgress
    from server.cli.users.importing import Import, Journal, count_people
    from server.cli.users.patience import PatientGateway, client_of
    from server.watching.background import lower_priority

    lower_priority()
    total = count_people(file)
    with closing(Journal(file, state)) as journal, ConsoleProgress() as progress, client_of(url) as client:
        progress.piece("people", 0, total)
        work = Import(PatientGateway(client), journal, lambda counts: progress.piece("people", counts.seen, total))
        counts = work.run(file, at_a_time)
    typer.echo(
        f"{counts.imported} imported, {counts.before} were already, {counts.failed} failed"
        + (f": see {journal.failed}" if counts.failed else "")
    )
    if counts.failed:
        raise typer.Exit(1)


@app.command()
def show(user_id: UserId, url: Url = None) -> None:
    """Show what is stored of a user, and which anchors speak for them."""
    from rich.console import Console
    from rich.filesize import decimal
    from rich.table import Table
    from rich.text import Text

    user = _call(url, lambda client: client.user(user_id))
    described = "none"
    if adapter := user.adapter:
        stale = ", of another bank: not served until it is trained again" if adapter["stale"] else ""
        made = f"{decimal(adapter['bytes'])}, of {adapter['created_at']}{stale}"
        described = f"{adapter['id']}, {made}; on {adapter['recipe']}"
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in {
        "user": user.user_id,
        "items": f"{user.items}, with their vectors {decimal(user.bytes)}",
        "updated": user.updated_at,
        "recipe": f"{user.recipe} (weights by {user.source})",
        "adapter": described,
    }.items():
        facts.add_row(name, Text(value, overflow="fold"))
    anchors = Table("anchor", "weight", "similarity", "predicted gain", title="Who speaks", title_justify="left")
    for anchor in user.anchors:
        numbers = (anchor.weight, anchor.similarity, anchor.gain)
        anchors.add_row(anchor.id, *("–" if number is None else f"{number:.3f}" for number in numbers))
    console = Console(highlight=False)
    console.print(facts)
    console.print(anchors)


@app.command()
def erase(
    user_id: UserId,
    url: Url = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False,
) -> None:
    """Erase everything that is stored of a user, for good."""
    if not yes:
        typer.confirm(f"Erase everything that is stored of {user_id!r}?", abort=True)
    answer = _call(url, lambda client: client.forget(user_id))
    assert answer
    counts = ", ".join(f"{count} {what}" for what, count in answer.erased.items())
    typer.echo(f"erased: {counts}; gone from the store's file on disk by {answer.log_rewritten_by}")


@app.command()
def export(
    user_id: UserId,
    url: Url = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to write, new or empty.", show_default="export-<hash of the id>")
    ] = None,
) -> None:
    """Write everything that is stored of a user to a folder: `user.json`, and `adapter/` as PEFT loads it."""
    # No id is ever part of a path.
    out = out or Path(f"export-{hashlib.sha256(user_id.encode()).hexdigest()[:16]}")
    document = _call(url, lambda client: client.export(user_id))
    for name in _write_export(out, document):
        typer.echo(str(out / name))
    if document["adapter"]:
        typer.echo(document["adapter"]["says"])


def _write_export(out: Path, document: dict[str, Any]) -> list[str]:
    """Write an export to a folder that is not there yet or empty; returns the files' names.

    Only its owner can read the folder, which appears when it is complete. MtaError when it cannot be written.
    """
    import orjson

    from bank.peft.exported import CONFIG_FILE, WEIGHTS_FILE

    files = {}
    adapter = document["adapter"]
    if adapter and (peft := adapter.pop("peft")):
        adapter["folder"] = "adapter"
        files[f"adapter/{CONFIG_FILE}"] = orjson.dumps(peft["config"], option=orjson.OPT_INDENT_2)
        files[f"adapter/{WEIGHTS_FILE}"] = base64.b64decode(peft["weights"])
    files = {"user.json": orjson.dumps(document, option=orjson.OPT_INDENT_2)} | files
    try:
        if out.exists() and any(out.iterdir()):
            raise MtaError(f"{out} is not empty: name another folder with --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export-", dir=out.parent) as draft:
            for name, raw in files.items():
                path = Path(draft, name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(raw)
            Path(draft).replace(out)
    except OSError as error:
        raise MtaError(f"cannot write the export to {out}: {error}") from error
    return list(files)


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

    asyncio.run(_readapt(load_settings(bank=bank, redis_url=redis_url), load_settings().bank, at_a_time))


async def _readapt(settings: Settings, usual: Path | None, at_a_time: int) -> None:
    """Train for the settings' bank; `usual` is the folder of the gateways' own."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    from bank.manifest import read_manifest
    from server.store.opening import open_stores
    from server.store.samples import JobBudget
    from server.store.tenants.user_key import Tenants
    from server.worker.readapting import Readapting, ReadaptTally, ServedBanks

    manifest = read_manifest(settings.bank_folder())
    async with open_stores(settings) as stores:
        ring, served = await stores.keys.all(), None
        if ring.banks:
            own = manifest.short  # of tenants that name none
            if own in ring.banks.values():
                own = read_manifest(usual).short if usual else ""
            secret = settings.secret.get_secret_value() if settings.secret else None
            served = ServedBanks(ring, own, Tenants(secret, settings.tenant), settings.tenant)
        budget = JobBudget(settings.job_tokens, settings.job_seconds)
        work = Readapting(stores.jobs, stores.adapters, stores.profiles, manifest, at_a_time, budget, served)
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
            task = progress.add_task("users", total=None)

            def on_user(tally: ReadaptTally, of: int) -> None:
                progress.update(task, completed=tally.queued + tally.settled + tally.waiting, total=of)

            tally = await work.run(on_user)
    Console(highlight=False).print(
        f"bank {manifest.short}: {tally.queued} users have a job, {tally.settled} need none, "
        f"{tally.waiting} wait for a request to remake their profile"
    )


def _call(url: str | None, method: Callable[[Client], T]) -> T:
    from server.cli.users.patience import PatientGateway, client_of

    with client_of(url) as client:
        return PatientGateway(client, _SHORT_PATIENCE_S).call(method)
