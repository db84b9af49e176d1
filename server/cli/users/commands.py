"""`mta users`: profiles into a gateway from a file, and what it stores of one person: shown, exported, erased."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from mta_client import Client
    from server.cli.users.importing import ImportCounts

T = TypeVar("T")

app = typer.Typer(help="People's profiles, over a gateway's HTTP API.", no_args_is_help=True)

Url = Annotated[str | None, typer.Option(help="URL of the gateway.", show_default="http://127.0.0.1, at MTA_PORT")]
UserId = Annotated[str, typer.Argument(help="The id that the app gives the user.", metavar="ID")]

_SHORT_PATIENCE_S = 5.0
_TELL_EVERY = 20


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
    from server.cli.users.importing import Import, journal_of
    from server.cli.users.patience import PatientGateway, client_of
    from server.cli.users.people import count_people
    from server.watching.background import stand_back

    stand_back()
    total = count_people(file)

    def tell(counts: ImportCounts) -> None:
        if counts.seen == total or counts.seen % _TELL_EVERY == 0:
            progress.piece("people", counts.seen, total)

    with closing(journal_of(file, state)) as journal, ConsoleProgress() as progress, client_of(url) as client:
        progress.piece("people", 0, total)
        counts = Import(PatientGateway(client), journal, tell).run(file, at_a_time)
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
    from server.cli.users.export_folder import default_folder, write_export

    document = _call(url, lambda client: client.export(user_id))
    for path in write_export(out or default_folder(user_id), document):
        typer.echo(str(path))
    if document["adapter"]:
        typer.echo(document["adapter"]["says"])


def _call(url: str | None, method: Callable[[Client], T]) -> T:
    from server.cli.users.patience import PatientGateway, client_of

    with client_of(url) as client:
        return PatientGateway(client, _SHORT_PATIENCE_S).call(method)
