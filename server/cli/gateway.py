"""`mta gateway`: the HTTP server that apps call, in the foreground."""

from __future__ import annotations

import logging
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from server.cli.process import log_to_stderr

if TYPE_CHECKING:
    from server.settings import Settings

GRACE_S = 5
"""How long running answers may go on after SIGTERM."""


def gateway(
    *,
    bank: Annotated[Path | None, typer.Option(help="Folder of the bank; MTA_BANK.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; MTA_HOST.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on, 0 for a free one; MTA_PORT.")] = None,
    redis_url: Annotated[str | None, typer.Option(help="Redis or Valkey; MTA_REDIS_URL.")] = None,
    engine_url: Annotated[str | None, typer.Option(help="The engine, or the router; MTA_ENGINE_URL.")] = None,
    embedder: Annotated[Path | None, typer.Option(help="Folder of the embedder; MTA_EMBEDDER.")] = None,
) -> None:
    """Start the gateway. Secrets come from MTA_SECRET and MTA_ENGINE_KEY; `mta settings` lists all settings."""
    import uvloop

    from server.settings import load_settings

    settings = load_settings(
        bank=bank, host=host, port=port, redis_url=redis_url, engine_url=engine_url, embedder=embedder
    )
    log_to_stderr()
    # uvicorn hands a signal on once it has shut down in order; there is nothing left to interrupt then.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    with _listening(settings.host, settings.port) as listener:
        uvloop.run(_serve(settings, listener))


async def _serve(settings: Settings, listener: socket.socket) -> None:
    """Open the parts, then serve until a signal. What cannot be opened is raised as it is."""
    import uvicorn

    from server.app import create_app

    app = create_app(settings)
    config = uvicorn.Config(
        app,
        lifespan="off",  # it is run here: uvicorn would turn its errors into a traceback in the log
        log_config=None,
        access_log=False,  # paths hold user ids
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    async with app.router.lifespan_context(app):
        host, port = listener.getsockname()[:2]
        logging.getLogger("mta.gateway").info("listening on http://%s:%d", host, port)
        await uvicorn.Server(config).serve(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """A socket that has the address, so that a port in use is found before anything is opened.

    Raises:
        MtaError: when the address cannot be had.
    """
    from adapters.errors import MtaError

    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # on Linux two sockets may be bound to one port, but only one may listen
    except OSError as error:
        if listener:
            listener.close()
        raise MtaError(
            f"cannot listen on {host}:{port}: {error.strerror or error}. Stop what listens there, or take another port "
            "with --port"
        ) from error
    return listener
