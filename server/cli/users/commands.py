"""`mta users`: import, show, export and erase users through a gateway; and `mta readapt`."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from adapters.errors import MtaError
from server.cli.shared import Bank, RedisUrl, table_console, with_stores
from server.settings import Settings, load_settings

if TYPE_CHECKING:
    from mta_client import Client
    from server.store.opening import Stores

T = TypeVar("T")

app = typer.Typer(help="Import, show, export and erase users through a gateway.", no_args_is_help=True)

Url = Annotated[str | None, typer.Option(help="URL of the gateway.", show_default="http://127.0.0.1, at MTA_PORT")]
UserId = Annotated[str, typer.Argument(help="The id that the app gives the user.", metavar="ID")]

_IMPORT_RETRY_S, _RETRY_S = 300.0, 5.0  # how long the import, and other commands, try a gateway that is busy or down


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="JSON, or a folder with a folder or an mbox for each person.")],
    url: Url = None,
    task: Annotated[str, typer.Option(help="The bank's task, by which a folder's mails become items.")] = "chat",
    at_a_time: Annotated[int, typer.Option(help="Maximum number of requests in flight.", min=1, max=64)] = 4,
    state: Annotated[Path | None, typer.Option(help="Hashes of imported people.", show_default="FILE.imported")] = None,
) -> None:
    """Import the people in FILE: a list of `{"user_id": …, "profile": [items]}`, one such object per line, or a folder.

    An item is a text, or an object with the fields of the bank's task. Each person's history is replaced. To continue
    an interrupted import, run the command again. People who cannot be imported are listed with the reason in
    FILE.failed.ndjson, and the exit status is 1. Calls to a busy or stopped gateway are retried for up to five minutes.
    """
    from bank.items.tasks import get_task
    from server.cli.progress import ConsoleProgress
    from server.cli.users.gateway import gateway_client
    from server.cli.users.importing import Journal, entries, import_people
    from server.observability.background import lower_priority

    lower_priority()
    total = sum(1 for _ in entries(file))
    with (
        closing(Journal(file, state)) as journal,
        ConsoleProgress() as progress,
        gateway_client(url, _IMPORT_RETRY_S) as client,
    ):
        progress.piece("people", 0, total)
        counts = import_people(
            client, journal, file, at_a_time, lambda people: progress.piece("people", people, total), get_task(task)
        )
    if counts["left out"]:
        typer.echo(f"{counts['left out']} files, mails or lines are left out: `mta bank check {file}` says why")
    summary = f"{counts['imported']} imported, {counts['skipped']} already imported, {counts['failed']} failed"
    if counts["failed"]:
        typer.echo(f"{summary}: see {journal.failed}")
        raise typer.Exit(1)
    typer.echo(summary)


@app.command()
def show(user_id: UserId, url: Url = None) -> None:
    """Show the stored data of a user, and the anchors that serve them."""
    user = call_gateway(url, lambda client: client.user(user_id))
    adapter_text = "none"
    if adapter := user.adapter:
        stale = ", for another bank: not served until it is retrained" if adapter["stale"] else ""
        made = f"{decimal(adapter['bytes'])}, made {adapter['created_at']}{stale}"
        adapter_text = f"{adapter['id']}, {made}; on {adapter['recipe']}"
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in {
        "user": user.user_id,
        "items": f"{user.items}, {decimal(user.bytes)} with vectors",
        "updated": user.updated_at,
        "recipe": f"{user.recipe} (weights by {user.source})",
        "adapter": adapter_text,
    }.items():
        facts.add_row(name, Text(value, overflow="fold"))
    anchors = Table("anchor", "weight", "similarity", "predicted gain", title="Anchors", title_justify="left")
    for anchor in user.anchors:
        numbers = (anchor.weight, anchor.similarity, anchor.gain)
        anchors.add_row(anchor.id, *("–" if number is None else f"{number:.3f}" for number in numbers))
    Console(highlight=False).print(facts, anchors, sep="\n")


@app.command()
def adapters(
    user_id: UserId,
    url: Url = None,
    serve: Annotated[int | None, typer.Option(help="First let this version serve, to go back to it.", min=1)] = None,
) -> None:
    """List the kept versions of a user's adapter."""
    if serve:
        call_gateway(url, lambda client: client.serve(user_id, serve))
    table = Table("version", "made", "samples", "rank", "loss before", "after", "size", "bank", "", pad_edge=False)
    for one in call_gateway(url, lambda client: client.adapters(user_id)):
        state = "stale" if one["stale"] else "serves" if one["serving"] else ""
        noted = ("–" if one[name] is None else f"{one[name]:.5g}" for name in ("samples", "rank", "before", "after"))
        table.add_row(str(one["version"]), one["created_at"], *noted, decimal(one["bytes"]), one["bank"], state)
    table_console().print(table if table.rows else "no adapter is kept: none was trained, or none was better")


@app.command()
def erase(
    user_id: UserId,
    url: Url = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Erase all stored data of a user permanently."""
    if not yes:
        typer.confirm(f"Erase all stored data of {user_id!r}?", abort=True)
    answer = call_gateway(url, lambda client: client.forget(user_id))
    assert answer
    counts = ", ".join(f"{count} {what}" for what, count in answer.erased.items())
    typer.echo(f"erased: {counts}; removed from the store's file on disk by {answer.log_rewritten_by}")


@app.command()
def export(
    user_id: UserId,
    url: Url = None,
    out: Annotated[
        Path | None, typer.Option(help="New or empty folder.", show_default="export-<hash of the id>")
    ] = None,
) -> None:
    """Export all stored data of a user to a folder: `user.json`, and `adapter/` in PEFT format."""
    # Use a hash, since an id must not be part of a path.
    out = out or Path(f"export-{hashlib.sha256(user_id.encode()).hexdigest()[:16]}")
    document = call_gateway(url, lambda client: client.export(user_id))
    for name in _write_export(out, document):
        typer.echo(str(out / name))
    if document["adapter"]:
        typer.echo(document["adapter"]["says"])


def _write_export(out: Path, document: dict[str, Any]) -> list[str]:
    """Write an export atomically to a new or empty folder that only its owner can read; return the file names."""
    import orjson

    from bank.peft.exported import CONFIG_FILE, WEIGHTS_FILE

    adapter = document["adapter"]
    peft = adapter.pop("peft") if adapter else None
    if peft:
        adapter["folder"] = "adapter"
    files = {"user.json": orjson.dumps(document, option=orjson.OPT_INDENT_2)}
    if peft:
        files[f"adapter/{CONFIG_FILE}"] = orjson.dumps(peft["config"], option=orjson.OPT_INDENT_2)
        files[f"adapter/{WEIGHTS_FILE}"] = base64.b64decode(peft["weights"])
    try:
        if out.exists() and any(out.iterdir()):
            raise MtaError(f"{out} is not empty: name another folder with --out")
        out.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export-", dir=out.parent) as draft:
            for name, raw in files.items():
                path = Path(draft, name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(raw)
            Path(draft).replace(out)  # the clean-up of `TemporaryDirectory` accepts that the folder is gone
    except OSError as error:
        raise MtaError(f"cannot write the export to {out}: {error}") from error
    return list(files)


def readapt(
    bank: Bank = None,
    redis_url: RedisUrl = None,
    at_a_time: Annotated[int, typer.Option(help="Maximum number of open jobs.", min=1)] = 4,
) -> None:
    """Create a training job from stored samples for every user whose adapter belongs to an old bank.

    To continue an interrupted run, run the command again. Users are served merged until they are adapted. If tenants
    have banks of their own (`mta keys bank`), users of other banks are skipped; this needs the gateways' MTA_SECRET.
    For a tenant's bank set --bank, and leave MTA_BANK as the gateways have it.
    """
    settings, default_bank = load_settings(bank=bank, redis_url=redis_url), load_settings().bank
    with_stores(settings, lambda stores: _readapt(stores, settings, default_bank, at_a_time))


async def _readapt(stores: Stores, settings: Settings, default_bank_folder: Path | None, at_a_time: int) -> None:
    """Create jobs for the settings' bank; `default_bank_folder` is the gateways' MTA_BANK."""
    from bank.manifest import read_manifest
    from server.cli.progress import ConsoleProgress
    from server.store.samples import JobBudget
    from server.store.tenants.user_key import Tenants
    from server.worker.readapting import Readapting, ServedBanks

    manifest, ring = read_manifest(settings.bank_folder()), await stores.keys.all()
    served = None
    if ring.banks:
        default_bank: str | None = manifest.short
        if manifest.short in ring.banks.values():  # the default bank may be another
            default_bank = read_manifest(default_bank_folder).short if default_bank_folder else None
        served = ServedBanks(ring, default_bank, Tenants(settings.user_secret, settings.tenant), settings.tenant)
    budget = JobBudget(settings.job_tokens, settings.job_seconds)
    work = Readapting(stores.jobs, stores.adapters, stores.profiles, manifest, at_a_time, budget, served)
    with ConsoleProgress() as progress:
        tally = await work.run(partial(progress.piece, "users"))
    Console(highlight=False).print(
        f"bank {manifest.short}: {tally.queued} users have a job, {tally.settled} need none, "
        f"{tally.waiting} wait for a request to remake their profile"
    )


def call_gateway(url: str | None, method: Callable[[Client], T]) -> T:
    from server.cli.users.gateway import gateway_client, gateway_errors

    with gateway_client(url, _RETRY_S) as client, gateway_errors(client):
        return method(client)
