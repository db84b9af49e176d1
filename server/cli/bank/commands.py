"""`mta bank`: build, look at, take apart and put together banks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from adapters.recipe import FusionMethod
from bank.build.options import BuildInputs, BuildOptions
from bank.errors import BankError
from server.cli.process import prepare_to_train
from server.settings import load_settings

app = typer.Typer(help="Build a bank, look into it, export and import its adapters.", no_args_is_help=True)

DEFAULTS = BuildOptions(task="chat")

ModelOption = Annotated[
    str | None, typer.Option(help="Base model: `default`, a folder, or a Hugging Face id.", show_default="MTA_MODEL")
]
EmbedderOption = Annotated[Path | None, typer.Option(help="Folder of an embedder.", show_default="MTA_EMBEDDER")]
OutOption = Annotated[Path, typer.Option(help="Folder to write.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace another bank in the folder.")]
UserRankOption = Annotated[int, typer.Option(help="Rank kept free for users' own stacked LoRAs.")]
TopOption = Annotated[int, typer.Option("--k", help="Most anchors in a user's recipe.")]
BankArgument = Annotated[Path | None, typer.Argument(help="The bank's folder; MTA_BANK without it.")]


@app.command()
def build(
    users: Annotated[Path, typer.Option(help="People's histories: LaMP's per-user layout, or LaMP's own questions.")],
    task: Annotated[str, typer.Option(help="What the items are: news_headline, movie_rating, chat …")],
    out: OutOption,
    outputs: Annotated[Path | None, typer.Option(help="LaMP's outputs file, beside its questions.")] = None,
    exclude: Annotated[Path | None, typer.Option(help="People to leave out: the same layout, or ids.")] = None,
    anchors: Annotated[int, typer.Option(help="How many anchors, exactly.")] = DEFAULTS.anchors,
    method: Annotated[FusionMethod, typer.Option(help="How recipes are fused.")] = DEFAULTS.method,
    common: Annotated[bool, typer.Option("--common/--no-common", help="A row that all users share.")] = True,
    rank: Annotated[int, typer.Option(help="Rank of every meta-LoRA.")] = DEFAULTS.rank,
    user_rank: UserRankOption = DEFAULTS.user_rank,
    target_modules: Annotated[
        str | None, typer.Option(help="Comma-separated, e.g. q_proj,v_proj.", show_default="all linear layers")
    ] = None,
    k: TopOption = DEFAULTS.k,
    strength: Annotated[
        float | None, typer.Option(help="What the anchors' weights sum to.", show_default="0.5; 1 with --no-common")
    ] = DEFAULTS.strength,
    weights: Annotated[
        str, typer.Option(help="What speaks for a user: topic, signature, or auto: signatures where possible.")
    ] = DEFAULTS.weights,
    signature_k: Annotated[int, typer.Option(help="As --k, by signature.")] = DEFAULTS.signature_k,
    signature_strength: Annotated[
        float, typer.Option(help="As --strength, by signature.")
    ] = DEFAULTS.signature_strength,
    tau: Annotated[float, typer.Option(help="How much a user's evidence counts.")] = DEFAULTS.tau,
    kappa: Annotated[float, typer.Option(help="How much similarity of topics counts beside it.")] = DEFAULTS.kappa,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Train the task's own row too, for `mta eval`.")
    ] = False,
    steps: Annotated[int, typer.Option(help="Optimiser steps of each anchor.")] = DEFAULTS.steps,
    common_steps: Annotated[int, typer.Option(help="Optimiser steps of the common row.")] = DEFAULTS.common_steps,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, instead of steps.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples a step.")] = DEFAULTS.batch_size,
    common_batch_size: Annotated[
        int, typer.Option(help="Examples a step of the common row.")
    ] = DEFAULTS.common_batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of the anchors.")] = DEFAULTS.learning_rate,
    common_learning_rate: Annotated[
        float, typer.Option(help="Peak rate of the common row.")
    ] = DEFAULTS.common_learning_rate,
    max_tokens: Annotated[int, typer.Option(help="Longest training example.")] = DEFAULTS.max_tokens,
    seed: Annotated[int, typer.Option(help="Same inputs and seed, same bank.")] = DEFAULTS.seed,
    dtype: Annotated[str, typer.Option(help="Of the frozen base: auto, bfloat16 or float32.")] = DEFAULTS.dtype,
    model: ModelOption = None,
    embedder: EmbedderOption = None,
    force: ForceOption = False,
) -> None:
    """Build a bank from people's histories.

    Killed and started again with the same options it goes on where it was, and ends with the same bank.
    """
    settings = load_settings()
    prepare_to_train()
    from bank.build.baselines import build_baselines
    from bank.build.build import build_bank
    from server.cli.bank.progress import ConsoleProgress

    options = BuildOptions(
        task=task,
        anchors=anchors,
        method=method,
        common=common,
        rank=rank,
        user_rank=user_rank,
        target_modules=tuple(name.strip() for name in target_modules.split(",")) if target_modules else None,
        k=k,
        strength=strength,
        weights=weights,
        signature_k=signature_k,
        signature_strength=signature_strength,
        tau=tau,
        kappa=kappa,
        steps=steps,
        common_steps=common_steps,
        epochs=epochs,
        batch_size=batch_size,
        common_batch_size=common_batch_size,
        learning_rate=learning_rate,
        common_learning_rate=common_learning_rate,
        max_tokens=max_tokens,
        seed=seed,
        dtype=dtype,
    )
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

    summary = summarise(_bank_folder(bank))
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

    export_anchor(_bank_folder(bank), anchor, out, with_common)
    typer.echo(f"{anchor} is a PEFT adapter at {out}")


@app.command("import")
def import_(
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders; they become a00, a01 … in this order.")],
    profiles: Annotated[
        Path, typer.Option(help="Profiles in LaMP's per-user layout; user_id is an adapter folder's name.")
    ],
    out: OutOption,
    task: Annotated[str, typer.Option(help="What the profiles' items are.")] = "chat",
    method: Annotated[FusionMethod, typer.Option(help="How recipes are fused: cat or linear.")] = FusionMethod.CAT,
    user_rank: UserRankOption = DEFAULTS.user_rank,
    k: TopOption = DEFAULTS.k,
    model: ModelOption = None,
    embedder: EmbedderOption = None,
    force: ForceOption = False,
) -> None:
    """Make a bank of PEFT adapters and their profiles."""
    settings = load_settings()
    from bank.lookup.embedder import Embedder
    from bank.manifest import MANIFEST_FILE
    from bank.models.folders import ensure_base_model, ensure_embedder, model_name
    from bank.peft.exchange import ImportOptions, import_bank

    if (out / MANIFEST_FILE).exists() and not force:
        raise BankError(f"{out} holds a bank already: name another --out, or replace it with --force")
    name = model or settings.model
    folder = ensure_base_model(name, settings.cache_dir)
    manifest = import_bank(
        adapters,
        profiles,
        out,
        ImportOptions(task=task, method=method, user_rank=user_rank, k=k),
        model_folder=folder,
        base_model=model_name(name, folder),
        embedder=Embedder.load(ensure_embedder(embedder or settings.embedder, settings.cache_dir)),
    )
    typer.echo(f"bank {manifest.short} at {out}: {len(manifest.anchors)} anchors, serving rank {manifest.serving_rank}")


def _bank_folder(bank: Path | None) -> Path:
    folder = bank or load_settings().bank
    if folder is None:
        raise BankError("no bank was named: give its folder, or set MTA_BANK")
    return folder
