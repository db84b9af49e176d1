"""`mta gateway`: the HTTP server that apps call, in the foreground."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
from typing import Annotated

import typer

from server.cli.shared import Bank, Embedder, RedisUrl, end_on_signals
from server.settings import Settings, load_settings
from server.watching.logs import log_to_stderr

log = logging.getLogger("mta.gateway")


def gateway(
    *,
    bank: Bank = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="MTA_HOST")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on, 0 for a free one.", show_default="MTA_PORT")
    ] = None,
    redis_url: RedisUrl = None,
    engine_url: Annotated[
        str | None, typer.Option(help="URL of the engine, or of the router.", show_default="MTA_ENGINE_URL")
    ] = None,
    embedder: Embedder = None,
) -> None:
    """Start the gateway. Secrets come from MTA_SECRET and MTA_ENGINE_KEY; `mta settings` lists all settings."""
    settings = load_settings(**locals())
    end_on_signals()
    gc.disable()  # collections would take a tenth of the start
    import uvloop

    from server.supervisor.services import listening

    log_to_stderr(settings.log_format)
    with listening(settings.host, settings.port) as listener:
        uvloop.run(_serve(settings, listener))


async def _serve(settings: Settings, listener: socket.socket) -> None:
    """Open the parts, then serve, until a signal, which may come at any time. Errors of opening are raised as is."""
    from server.gateway.app import create_app
    from server.gateway.http.serving import GatewayServer, uvicorn_config

    app = create_app(settings)
    server = GatewayServer(uvicorn_config(app, settings))
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task
    opening = True

    def stop(number: signal.Signals) -> None:
        server.handle_exit(number, None)
        if opening:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    try:
        async with app.router.lifespan_context(app):
            opening = False
            gc.collect()
            gc.enable()
            gc.freeze()  # what is here now stays: each collection that scanned it would block the event loop
            host, port = listener.getsockname()[:2]
            log.info("listening on http://%s:%d (console: http://%s:%d/console)", host, port, host, port)
            await server.serve(sockets=[listener])
    except asyncio.CancelledError:
        if not server.should_exit:
            raise
        log.info("stopped while starting")
        # Everything is closed, except perhaps a thread that is reading a model: a thread cannot be stopped.
        logging.shutdown()
        os._exit(0)
