"""`mta engine`: vLLM's own OpenAI server with the plugin, in the foreground."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def engine(
    bank: Annotated[Path | None, typer.Option(help="Folder of the bank.", show_default="MTA_BANK")] = None,
    model: Annotated[
        str | None, typer.Option(help="Base model: folder, hub id or `default`.", show_default="MTA_MODEL")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default="MTA_ENGINE_HOST")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default="MTA_ENGINE_PORT")] = None,
) -> None:
    """Start the engine: check the bank and the model, then become the vLLM process.

    All other options are settings (`mta settings`); the key comes from MTA_ENGINE_KEY.
    """
    from server.engine.command import prepare_engine
    from server.settings import load_settings
    from server.watching.logs import log_to_stderr

    settings = load_settings(bank=bank, model=model, engine_host=host, engine_port=port)
    log_to_stderr(settings.log_format)
    argv, environment = prepare_engine(settings)
    os.execve(argv[0], argv, environment)
