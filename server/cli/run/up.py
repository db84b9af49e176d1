"""`mta up`: all parts on this machine, started, watched and stopped together."""

from __future__ import annotations

import asyncio
import signal
from contextlib import closing
from http import HTTPStatus
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from server.settings import Settings
    from server.supervisor.data_folder import DataFolder
    from server.supervisor.parts import Part

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def up(
    *,
    bank: Annotated[Path | None, typer.Option(help="Folder of the bank.", show_default="MTA_BANK")] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model: folder, hub id or `default`.", show_default="MTA_MODEL")
    ] = None,
    port: Annotated[
        int | None, typer.Option(help="Port of the gateway, 0 for a free one.", show_default="MTA_PORT")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder for everything that survives restarts.", show_default="MTA_DATA_DIR")
    ] = None,
    redis_url: Annotated[
        str | None, typer.Option(help="Use this Redis; do not start Valkey.", show_default="MTA_REDIS_URL")
    ] = None,
    engine_url: Annotated[
        str | None, typer.Option(help="Use this engine; do not start vLLM.", show_default="MTA_ENGINE_URL")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Data type of weights and KV cache.", show_default="MTA_DTYPE")
    ] = None,
    replicas: Annotated[
        int | None, typer.Option(help="How many engines, behind a router if several.", show_default="MTA_REPLICAS")
    ] = None,
    max_loras: Annotated[
        int | None, typer.Option(help="How many recipes one batch can mix.", show_default="MTA_MAX_LORAS")
    ] = None,
) -> None:
    """Start everything on this machine, keep it running, and stop it all on Ctrl-C.

    It listens on 127.0.0.1 only. All other options are settings (`mta settings`), which every part gets.
    """
    from server.settings import load_settings
    from server.supervisor.services import LOOPBACK, free_port

    settings = load_settings(
        bank=bank,
        model=model,
        port=port,
        data_dir=data,
        redis_url=redis_url,
        engine_url=engine_url,
        dtype=dtype,
        replicas=replicas,
        max_loras=max_loras,
    )
    _run(settings.model_copy(update={"host": LOOPBACK, "inner_host": LOOPBACK, "port": settings.port or free_port()}))


def _run(settings: Settings) -> None:
    """Check everything that can be checked, then start."""
    from server.cli.run.machine import parts_of
    from server.supervisor.data_folder import DataFolder
    from server.supervisor.services import check_port
    from server.supervisor.status import LastingConsole

    console = LastingConsole(highlight=False)
    check_port(settings.port)
    with closing(DataFolder.open(settings.data_dir.expanduser().resolve())) as data:
        console.print(f"mta up: data and logs in {data.path}", soft_wrap=True)
        console.print("  checking the bank, the base model and the embedder")
        settings, parts = parts_of(settings, data, lambda line: console.print(f"  {line}", soft_wrap=True))
        asyncio.run(_supervise(settings, parts, data, console))


async def _supervise(settings: Settings, parts: list[Part], data: DataFolder, console: Console) -> None:
    """Run the parts until a signal says otherwise; a second signal cuts their shutdown short."""
    from server.supervisor.status import Status
    from server.supervisor.supervisor import Supervisor

    stop, hurry = asyncio.Event(), asyncio.Event()

    def interrupted() -> None:
        if console.is_terminal and not stop.is_set():
            console.print()  # the terminal has written ^C
        (hurry if stop.is_set() else stop).set()

    def started() -> None:
        status.close()
        keyed = wants_key(settings.host, settings.port)
        console.print(welcome(f"http://{settings.host}:{settings.port}", keyed=keyed), soft_wrap=True)

    for number in _SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, interrupted)
    for part in parts:
        data.rotate_log(part.name)
    with closing(Status(console, [part.name for part in parts])) as status:
        await Supervisor(parts, data, status).run(stop, hurry, started)


def wants_key(host: str, port: int) -> bool:
    """Whether an API key exists, so that the gateway answers nobody without one."""
    with closing(HTTPConnection(host, port, timeout=5)) as connection:
        try:
            connection.request("GET", "/bank")
            return connection.getresponse().status == HTTPStatus.UNAUTHORIZED
        except OSError:
            return False


def welcome(url: str, *, keyed: bool) -> str:
    """What to do next."""
    key = ' -H "Authorization: Bearer $MTA_API_KEY"' if keyed else ""
    return (
        f"\nReady: {url} (console: {url}/console, API documentation: {url}/docs). Try\n\n"
        f"  curl -s {url}/generate{key} -H 'Content-Type: application/json' \\\n"
        """    -d '{"user_id": "ada", "prompt": "Write one sentence about rain."}'\n\n"""
        "Ctrl-C stops everything.\n"
    )
