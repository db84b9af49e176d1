"""`mta models`: prepare the base model, the embedder and the CPU kernel ahead of time, and print their paths."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from server.cli.shared import Embedder, Model
from server.settings import load_settings


def models(
    model: Model = None,
    embedder: Embedder = None,
    cache_dir: Annotated[
        Path | None, typer.Option(help="Folder for default models.", show_default="MTA_CACHE_DIR")
    ] = None,
) -> None:
    """Prepare the base model, the embedder and, with vLLM for CPUs, the CPU kernel, and print their paths.

    Other commands prepare them on first use, if the folder is writable; this command does so ahead of time.
    """
    settings = load_settings(**locals())
    from bank.models.folders import ensure_base_model, ensure_embedder
    from server.engine.command import is_cpu_build
    from server.engine.cpu import native

    cache = settings.cache_dir
    base_folder = _timed(f"base model {settings.model!r}", lambda: ensure_base_model(settings.model, cache))
    embedder_folder = _timed("embedder", lambda: ensure_embedder(settings.embedder, cache))
    typer.echo(f"base model  {base_folder}")
    typer.echo(f"embedder    {embedder_folder}")
    if is_cpu_build():
        typer.echo("preparing the CPU kernel …", err=True)
        if native.build(cache):
            typer.echo(f"CPU kernel  {native.library_path(cache)}")


def _timed(what: str, prepare: Callable[[], Path]) -> Path:
    """Report progress on stderr, so that stdout has only the folders."""
    typer.echo(f"preparing the {what} …", err=True)
    start_s = time.perf_counter()
    folder = prepare()
    typer.echo(f"the {what} is ready ({time.perf_counter() - start_s:.1f} s)", err=True)
    return folder
