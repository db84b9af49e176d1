"""`mta bank`: build, look at, take apart and put together banks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from bank.building.options import BuildInputs, BuildOptions, ImportOptions
from bank.errors import BankError
from server.cli.bank.options import with_options
from server.cli.process import prepare_to_train
from server.settings import load_settings

app = typer.Typer(help="Build a bank, look into it, export and import its adapters.", no_args_is_help=True)

ModelOption = Annotated[
    str | None, typer.Option(help="Base model: `default`, a folder, or a Hugging Face id.", show_default="MTA_MODEL")
]
EmbedderOption = Annotated[Path | None, typer.Option(help="Folder of an embedder.", show_default="MTA_EMBEDDER")]
OutOption = Annotated[Path, typer.Option(help="Folder to write.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace another bank in the folder.")]
BankArgument = Annotated[Path | None, typer.Argument(help="The bank's folder; MTA_BANK without it.")]


@app.command()
@with_options
def build(
    *,
    users: Annotated[Path, typer.Option(help="People's histories: LaMP's per-user layout, or LaMP's own questions.")],
    out: OutOption,
    outputs: Annotated[Path | None, typer.Option(help="LaMP's outputs file, beside its questions.")] = None,
    exclude: Annotated[Path | None, typer.Option(help="People to leave out: the same layout, or ids.")] = None,
    options: BuildOptions,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Train the task's own row too, for `mta eval`.")
    ] = False,
    model: ModelOption = None,
    embedder: EmbedderOption = None,
    force: ForceOption = False,
) -> None:
    """Build a bank from people's histories.

    Killed and started again with the same options it goes on where it was, and ends with the same bank.
    """
    settings = load_settings()
    prepare_to_train()
    from bank.building.baselines import build_baselines
    from bank.building.build import build_bank
    from server.cli.bank.progress import ConsoleProgress

    inputs = BuildInputs(
        users=users,
        out=out,
        outputs=outputs,
        exclude=exclude,
        model=model or settings.model,
        embedder=embedder or settings.embedder,
        cache_dir=settings.cache_dir,
        force=force,
    )
    with ConsoleProgress() as progress:
        try:
            manifest = build_bank(inputs, options, progress)
            if baselines:
                build_baselines(inputs, options, manifest, progress)
        except KeyboardInterrupt:
            progress.say("stopped; the same command goes on with the next row")
            sys.exit(130)
    typer.echo(f"bank {manifest.short} at {out}: {len(manifest.anchors)} anchors, serving rank {manifest.serving_rank}")


@app.command()
def info(
    bank: BankArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
) -> None:
    """Show what a bank holds: anchors, sizes, fingerprint, index, ranks and the room left, rule of weights."""
    from bank.lookup.summary import summarise

    summary = summarise(load_settings(bank=bank).bank_folder())
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
        return
    from server.cli.bank.tables import print_summary

    print_summary(summary)


@app.command()
def export(
    anchor: Annotated[str, typer.Option(help="The anchor's id, e.g. a03.")],
    out: OutOption,
    bank: BankArgument = None,
    with_common: Annotated[
        bool, typer.Option("--with-common", help="The common row and the anchor, as a recipe of that anchor alone has.")
    ] = False,
) -> None:
    """Write an anchor's adapter as a PEFT folder."""
    from bank.peft.exchange import export_anchor

    export_anchor(load_settings(bank=bank).bank_folder(), anchor, out, with_common)
    typer.echo(f"{anchor} is a PEFT adapter at {out}")


@app.command("import")
@with_options
def import_(
    *,
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders; they become a00, a01 … in this order.")],
    profiles: Annotated[
        Path, typer.Option(help="Profiles in LaMP's per-user layout; user_id is an adapter folder's name.")
    ],
    out: OutOption,
    options: ImportOptions,
    model: ModelOption = None,
    embedder: EmbedderOption = None,
    force: ForceOption = False,
) -> None:
    """Make a bank of PEFT adapters and their profiles."""
    settings = load_settings()
    from bank.lookup.embedder import Embedder
    from bank.manifest import MANIFEST_FILE
    from bank.models.folders import ensure_base_model, ensure_embedder, model_name
    from bank.peft.exchange import import_bank

    if (out / MANIFEST_FILE).exists() and not force:
        raise BankError(f"{out} holds a bank already: name another --out, or replace it with --force")
    name = model or settings.model
    folder = ensure_base_model(name, settings.cache_dir)
    manifest = import_bank(
        adapters,
        profiles,
        out,
        options,
        model_folder=folder,
        base_model=model_name(name, folder),
        embedder=Embedder.load(ensure_embedder(embedder or settings.embedder, settings.cache_dir)),
    )
    typer.echo(f"bank {manifest.short} at {out}: {len(manifest.anchors)} anchors, serving rank {manifest.serving_rank}")
