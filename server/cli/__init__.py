"""The `mta` command. Each module below holds one command or one group; heavy imports wait until it runs."""

from __future__ import annotations

import sys

import typer

from adapters.errors import MtaError
from server.cli import models, settings
from server.cli.bank import commands as bank
from server.cli.bench import commands as bench
from server.cli.eval import commands as eval
from server.cli.keys import commands as keys
from server.cli.run import engine, gateway, router, up, worker
from server.cli.users import chat, readapt
from server.cli.users import commands as users

app = typer.Typer(
    name="mta",
    help="Online personalisation server: one base model, one bank of adapters, millions of users.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.command("up")(up.up)
app.add_typer(bank.app, name="bank")
app.command("eval")(eval.evaluate)
app.add_typer(bench.app, name="bench")
app.command("models")(models.models)
app.command("gateway")(gateway.gateway)
app.command("engine")(engine.engine)
app.command("router")(router.router)
app.command("worker")(worker.worker)
app.add_typer(keys.app, name="keys")
app.add_typer(users.app, name="users")
app.command("chat")(chat.chat)
app.command("readapt")(readapt.readapt)
app.command("settings")(settings.settings)


def main() -> None:
    """Entry point of the console script: known errors become one line on stderr and exit status 1."""
    try:
        app()
    except MtaError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)
