"""`mta bank`: build and inspect banks, import and export their adapters."""

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

app = typer.Typer(help="Build and inspect a bank, export and import its adapters.", no_args_is_help=True)

ModelOption = Annotated[
    str | None, typer.Option(help="Base model: `default`, a folder, or a Hugging Face id.", show_default="MTA_MODEL")
]
EmbedderOption = Annotated[Path | None, typer.Option(help="Folder of the embedder.", show_default="MTA_EMBEDDER")]
OutOption = Annotated[Path, typer.Option(help="Output folder.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace another bank in the output folder.")]
BankArgument = Annotated[Path | None, typer.Argument(help="Folder of the bank.", show_default="MTA_BANK")]


@app.command()
@with_options
def build(
    *,
    users: Annotated[Path, typer.Option(help="People's histories: LaMP's per-user layout, or LaMP's own questions.")],
    out: OutOption,
    outputs: Annotated[Path | None, typer.Option(help="With LaMP's questions: its outputs file.")] = None,
    exclude: Annotated[
        Path | None, typer.Option(help="People to leave out: a file in the same layout, or of ids.")
    ] = None,
    options: BuildOptions,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Also train the task's own row, for `mta eval`.")
    ] = False,
    model: ModelOption = None,
    embedder: EmbedderOption = None,
    force: ForceOption = False,
) -> None:
    """Build a bank from people's histories.

    If it is interrupted, run it again with the same options: it continues where it stopped and makes the same bank.
    """
    settings = load_settings()
    prepare_to_train()
    from bank.building.baselines import build_baselines, check_baselines
    from bank.building.build import build_bank
    from bank.evaluation.verdict import judge_bank
    from bank.lookup.verdict import in_words
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
    if baselines:
        check_baselines(common=options.common)
    with ConsoleProgress() as progress:
        try:
            manifest = judge_bank(inputs, options, build_bank(inputs, options, progress), progress)
            if baselines:
                build_baselines(inputs, options, manifest, progress)
        except KeyboardInterrupt:
            progress.say("stopped; run the same command again to continue with the next row")
            sys.exit(130)
    typer.echo(f"bank {manifest.short} at {out}: {len(manifest.anchors)} anchors, serving rank {manifest.serving_rank}")
    if manifest.verdict:
        typer.echo(in_words(manifest.verdict))


@app.command()
def info(
    bank: BankArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what a bank holds: anchors, sizes, fingerprint, index, ranks, room for user adapters, rule of weights."""
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
        bool, typer.Option("--with-common", help="Add the common row, as a recipe of this anchor alone does.")
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
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders; they become a00, a01, … in this order.")],
    profiles: Annotated[
        Path, typer.Option(help="Profiles in LaMP's per-user layout; each user_id is the name of an adapter folder.")
    ],
    out: OutOption,
    options: ImportOptions,
    model: ModelOption = None,
    embedder: EmbedderOption = None,
    force: ForceOption = False,
) -> None:
    """Make a bank from PEFT adapters and their profiles."""
    settings = load_settings()
    from bank.lookup.embedder import Embedder
    from bank.manifest import MANIFEST_FILE
    from bank.models.folders import ensure_base_model, ensure_embedder, model_name
    from bank.peft.exchange import import_bank

    if (out / MANIFEST_FILE).exists() and not force:
        raise BankError(f"{out} already holds a bank: choose another --out, or replace it with --force")
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
