"""`mta router`: the router in front of several engines, in the foreground."""

from __future__ import annotations

import os
from typing import Annotated

import typer


def router(
    engine_urls: Annotated[
        str | None, typer.Option(help="Every engine's URL, comma-separated.", show_default="MTA_ENGINE_URLS")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="MTA_ROUTER_HOST")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="MTA_ROUTER_PORT")] = None,
) -> None:
    """Start the router: become the vllm-router process, which sends the same recipe to the same engine.

    It holds no key: the gateway's passes through it. Never open its port to the outside.
    """
    from server.settings import load_settings
    from server.supervisor.router import router_command

    argv, environment = router_command(load_settings(engine_urls=engine_urls, router_host=host, router_port=port))
    os.execve(argv[0], argv, environment)
