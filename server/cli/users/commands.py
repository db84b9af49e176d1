"""`mta users`: profiles into a gateway from a file, and what it stores of one person: shown, exported, erased."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from server.cli.users.gateway import Gateway
    from server.cli.users.importing import Counts

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
    from server.cli.users.people import count_people
    from server.watching.background import stand_back

    stand_back()
    total = count_people(file)

    async def run(progress: ConsoleProgress) -> Counts:
        def tell(counts: Counts) -> None:
            if counts.seen == total or counts.seen % _TELL_EVERY == 0:
                progress.piece("people", counts.seen, total)

        async with _gateway(url) as gateway:
            return await Import(gateway, journal, tell).run(file, at_a_time)

    with journal_of(file, state) as journal, ConsoleProgress() as progress:
        progress.piece("people", 0, total)
        counts = asyncio.run(run(progress))
    typer.echo(
        f"{counts.imported} imported, {counts.before} were already, {counts.failed} failed"
        + (f": see {journal.failed}" if counts.failed else "")
    )
    if counts.failed:
        raise typer.Exit(1)


@app.command()
def show(user_id: UserId, url: Url = None) -> None:
    """Show what is stored of a user, and which anchors speak for them."""
    from server.cli.users.gateway import user_path
    from server.cli.users.tables import print_user

    print_user(_ask(url, lambda gateway: gateway.json("GET", user_path(user_id))))


@app.command()
def erase(
    user_id: UserId,
    url: Url = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask first.")] = False,
) -> None:
    """Erase everything that is stored of a user, for good."""
    from server.cli.users.gateway import user_path

    if not yes:
        typer.confirm(f"Erase everything that is stored of {user_id!r}?", abort=True)
    answer = _ask(url, lambda gateway: gateway.json("DELETE", user_path(user_id)))
    counts = ", ".join(f"{count} {what}" for what, count in answer["erased"].items())
    typer.echo(f"erased: {counts}; gone from the store's file on disk by {answer['log_rewritten_by']}")


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
    from server.cli.users.gateway import user_path

    document: dict[str, Any] = _ask(url, lambda gateway: gateway.json("GET", user_path(user_id, "export")))
    for path in write_export(out or default_folder(user_id), document):
        typer.echo(str(path))
    if document["adapter"]:
        typer.echo(document["adapter"]["says"])


def _ask(url: str | None, question: Callable[[Gateway], Awaitable[T]]) -> T:
    async def ask() -> T:
        async with _gateway(url, _SHORT_PATIENCE_S) as gateway:
            return await question(gateway)

    return asyncio.run(ask())


def _gateway(url: str | None, patience_s: float | None = None) -> Gateway:
    from server.cli.users.gateway import PATIENCE_S, Gateway
    from server.settings import load_settings

    settings = load_settings()
    key = settings.api_key.get_secret_value() if settings.api_key else None
    return Gateway(url or f"http://127.0.0.1:{settings.port}", patience_s or PATIENCE_S, key)
