"""`mta gateway`: the HTTP server that apps call, in the foreground."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from typing import Annotated

from server.cli.shared import Bank, Embedder, RedisUrl, end_on_signals, setting
from server.observability.audit import audit_to
from server.observability.logs import log_to_stderr
from server.settings import Settings, load_settings

log = logging.getLogger("mta.gateway")


def gateway(
    *,
    bank: Bank = None,
    host: Annotated[str | None, setting("host")] = None,
    port: Annotated[int | None, setting("port", about="Port to listen on, 0 for a free one.")] = None,
    redis_url: RedisUrl = None,
    engine_url: Annotated[str | None, setting("engine_url")] = None,
    embedder: Embedder = None,
) -> None:
    """Start the gateway. Secrets come from MTA_SECRET and MTA_ENGINE_KEY; `mta settings` lists all settings."""
    settings = load_settings(**locals())
    end_on_signals()
    gc.disable()  # collections would take a tenth of the startup time
    import uvloop

    from server.supervisor.services import listening

    log_to_stderr(settings.log_format)
    audit_to(settings.audit)
    with listening(settings.host, settings.port) as listener:
        uvloop.run(_serve(settings, listener))


async def _serve(settings: Settings, listener: socket.socket) -> None:
    """Open the app and serve until a signal; a signal during startup ends the process at once."""
    from server.gateway.app import create_app
    from server.gateway.http.serving import GatewayServer, uvicorn_config

    app = create_app(settings)
    server = GatewayServer(uvicorn_config(app, settings))
    async with app.router.lifespan_context(app):
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, server.handle_exit, number, None)
        gc.collect()
        gc.enable()
        gc.freeze()  # exclude the loaded modules from collections, which block the event loop
        host, port = listener.getsockname()[:2]
        url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        log.info("listening on %s (console: %s/console)", url, url)
        await server.serve(sockets=[listener])
