"""The `mta` command. Each module holds one command or group; heavy modules are imported when a command runs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import textwrap
import threading
from importlib.metadata import version
from typing import Annotated

import typer

from adapters.errors import MtaError
from bank.models.process_startup import run_and_exit, without_audio
from server.cli import audit, backup, bench, eval, keys, secret
from server.cli.bank import commands as bank
from server.cli.demo import commands as demo
from server.cli.run import doctor, gateway, processes, verify
from server.cli.users import chat, worth
from server.cli.users import commands as users
from server.settings import GROUPS, Settings, load_settings

MOST_COLUMNS = 100  # of a text that is read
app = typer.Typer(name="mta", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")
# Exceptions that signal handlers raise; `exit_on_signals` raises SystemExit.
_SIGNALS: dict[type[BaseException], signal.Signals] = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}
_URL_PASSWORD = re.compile(r"(://[^:/@]*:)[^/]+(?=@)|(password=)[^&]+")  # the first up to the URL's last @


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mta {version('mta-server')}")
        raise typer.Exit


@app.callback()
def options(
    *,
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Online personalisation server: one base model, one bank of adapters, millions of users."""


app.command("demo")(demo.demo)
app.command("up")(processes.up)
app.command("doctor")(doctor.doctor)
app.command("verify")(verify.verify)
app.add_typer(bank.app, name="bank")
app.command("eval")(eval.evaluate)
app.add_typer(bench.app, name="bench")
app.command("models")(processes.models)
app.command("gateway")(gateway.gateway)
app.command("engine")(processes.engine)
app.command("router")(processes.router)
app.command("worker")(processes.worker)
app.add_typer(keys.app, name="keys")
app.add_typer(secret.app, name="secret")
app.command("audit")(audit.audit)
app.command("backup")(backup.backup)
app.command("restore")(backup.restore)
app.add_typer(users.app, name="users")
app.command("chat")(chat.chat)
app.command("rewrite")(chat.rewrite)
app.command("worth")(worth.worth)
app.command("readapt")(users.readapt)


@app.command()
def settings() -> None:
    """Show every setting: its environment variable, its current value and its purpose. Secrets are hidden."""
    current, indent = load_settings(), "    "
    width = min(MOST_COLUMNS, shutil.get_terminal_size((MOST_COLUMNS, 24)).columns)
    for name, field in Settings.model_fields.items():
        if name in GROUPS:
            typer.secho(f"\n{GROUPS[name]}", bold=True)
        value = getattr(current, name)
        shown = "" if value is None else _URL_PASSWORD.sub(r"\1\2***", str(value))  # secrets print as asterisks
        typer.echo(f"MTA_{name.upper()} = {shown}".removesuffix(" = "))
        typer.echo(textwrap.fill(field.description or "", width, initial_indent=indent, subsequent_indent=indent))


def main() -> None:
    sys.unraisablehook = _resend_signal
    without_audio()
    run_and_exit(run)


def run() -> None:
    """Run the command line; known errors become one line on stderr and exit status 1."""
    try:
        app()
    except MtaError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(1)


def _resend_signal(lost: sys.UnraisableHookArgs) -> None:
    """Send a signal again if the interpreter swallowed its exception in a callback."""
    number = _SIGNALS.get(lost.exc_type)
    if number is None:
        sys.__unraisablehook__(lost)
        return
    timer = threading.Timer(0.05, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
