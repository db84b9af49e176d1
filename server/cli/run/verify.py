"""`mta verify`: whether running engines read texts as training does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapters.errors import MtaError
from server.cli.shared import Bank, Data, Model, prepare_to_train, setting
from server.cli.users.commands import Url
from server.settings import load_settings

User = Annotated[str | None, typer.Option(help="Read this user's items, also with their recipe and adapter.")]


def verify(
    *,
    bank: Bank = None,
    model: Model = None,
    data: Data = None,
    engine_url: Annotated[str | None, setting("engine_url", about="The engine; default: those of `mta up`.")] = None,
    user: User = None,
    texts: Annotated[Path | None, typer.Option(help="Read these texts, one a line.")] = None,
    url: Url = None,
) -> None:
    """Check that the running engine reads texts as training does, with and without adapters.

    For each text and recipe it prints how far the log-probabilities of the tokens are apart, and how many times the
    effect in training the adapter has. It needs as much memory as a worker, and no GPU. Exit status 0 if all are within
    the bound for the engine's dtype, 1 if not, 2 if it could not be run.
    """
    prepare_to_train(gpu=False)  # an engine leaves it no room
    from server.cli.run.verification import verified

    try:
        settings = load_settings(bank=bank, model=model, data_dir=data, engine_url=engine_url)
        within = verified(settings, user, texts, url)
    except (MtaError, OSError) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from error
    raise typer.Exit(0 if within else 1)
