"""`mta up`: start, watch and stop all parts on this machine."""

from __future__ import annotations

import asyncio
import signal
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.console import Console

from server.cli.shared import Bank, Model, setting
from server.settings import load_settings

if TYPE_CHECKING:
    from server.supervisor.supervisor import Status, Supervisor


def up(
    *,
    bank: Bank = None,
    model: Model = None,
    port: Annotated[int | None, setting("port", about="Port of the gateway, 0 for a free one.")] = None,
    data_dir: Annotated[Path | None, setting("data_dir", "--data")] = None,
    redis_url: Annotated[str | None, setting("redis_url", about="Use this Redis; do not start Valkey.")] = None,
    engine_url: Annotated[str | None, setting("engine_url", about="Use this engine; do not start vLLM.")] = None,
    dtype: Annotated[str | None, setting("dtype")] = None,
    replicas: Annotated[int | None, setting("replicas")] = None,
    max_loras: Annotated[int | None, setting("max_loras")] = None,
) -> None:
    """Start everything on this machine, keep it running, and stop it all on Ctrl-C.

    The gateway listens on 127.0.0.1 only. All other options are settings (`mta settings`), which every part gets.
    """
    settings = load_settings(**locals())
    from server.cli.run.machine import parts_of
    from server.supervisor.data_folder import DataFolder
    from server.supervisor.services import LOOPBACK, free_port, listening
    from server.supervisor.supervisor import PipeSafeConsole, Status, Supervisor

    port = settings.port or free_port()
    settings = settings.model_copy(update={"host": LOOPBACK, "inner_host": LOOPBACK, "port": port})
    console = PipeSafeConsole(highlight=False)
    listening(LOOPBACK, port).close()
    with closing(DataFolder.open(settings.data_dir.expanduser().resolve())) as data:
        console.print(f"mta up: data and logs in {data.path}", soft_wrap=True)
        console.print("  checking the bank, the base model and the embedder")
        parts = parts_of(settings, data, lambda line: console.print(f"  {line}", soft_wrap=True))
        with closing(Status(console, [part.name for part in parts])) as status:
            asyncio.run(_supervise(Supervisor(parts, data, status), status, console, f"http://{LOOPBACK}:{port}"))


async def _supervise(supervisor: Supervisor, status: Status, console: Console, url: str) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def interrupted() -> None:
        if console.is_terminal and not stop.is_set():
            console.print()  # the terminal has written ^C
        (hurry if stop.is_set() else stop).set()  # a second signal cuts the shutdown short

    def started() -> None:
        status.close()
        console.print(welcome(url), soft_wrap=True)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, interrupted)
    await supervisor.run(stop, hurry, started)


def welcome(url: str) -> str:
    """Return the message shown once all is ready, with an Authorization header if the gateway requires a key."""
    import httpx

    keyed = False
    with suppress(httpx.HTTPError):
        keyed = httpx.get(f"{url}/bank", trust_env=False).status_code == httpx.codes.UNAUTHORIZED
    key = ' -H "Authorization: Bearer $MTA_API_KEY"' if keyed else ""
    return (
        f"\nReady: {url} (console: {url}/console, API documentation: {url}/docs). Try\n\n"
        f"  curl -s {url}/generate{key} -H 'Content-Type: application/json' \\\n"
        """    -d '{"user_id": "ada", "prompt": "Write one sentence about rain."}'\n\n"""
        "Ctrl-C stops everything.\n"
    )
