"""`mta bank`: build and inspect banks, import and export their adapters."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from adapters.training.example import Acts
from bank.building.options import BuildInputs, BuildOptions, ImportOptions
from bank.errors import BankError
from server.cli.shared import Embedder, Model, prepare_to_train
from server.settings import load_settings

app = typer.Typer(help="Build and inspect banks, export and import their adapters.", no_args_is_help=True)

USERS = "A folder with a folder or an mbox for each person; or histories as JSON, in a layout of LaMP's."
Out = Annotated[Path, typer.Option(help="Output folder.")]
Exclude = Annotated[Path | None, typer.Option(help="People to exclude: a file in the same layout, or a list of ids.")]
Modules = Annotated[str | None, typer.Option(help="Comma-separated, e.g. q_proj,v_proj; default: all linear layers.")]
Force = Annotated[bool, typer.Option("--force", help="Replace another bank in the output folder, or a half-built one.")]
BankArgument = Annotated[Path | None, typer.Argument(help="Folder of the bank.", show_default="MTA_BANK")]
AnchorsBy = Annotated[str, typer.Option(help="Anchors: topics (the longest history of each topic) or longest.")]
Directions = Annotated[
    int | None,
    typer.Option(
        help="Directions that replace the anchors' rows; 0: none.",
        show_default="above 64 anchors, as many as keep 95 % of the gain",
    ),
]
UserRank = Annotated[int, typer.Option(help="Rank reserved for users' own stacked LoRAs.")]
Top = Annotated[int, typer.Option(help="Maximum number of anchors in a recipe by topics.")]
HistoryShare = Annotated[float, typer.Option(help="Share of training items with past items in the prompt.")]
ActsFrom = Annotated[Acts, typer.Option(help="From where on adapters are personal.")]
Verdict = Annotated[bool, typer.Option(help="Hold out a few people, and measure the bank's gain on them.")]
Ranks = Annotated[int | None, typer.Option(min=1, help="Processes that build it; default on CPU: one for each core.")]
RANK_BYTES = 2 << 30  # a rank's memory besides the base model, as measured with SmolLM2-135M: 2.5 GB in all
_BUILD, _IMPORT = BuildOptions("chat"), ImportOptions()  # for their defaults
T = TypeVar("T", BuildOptions, ImportOptions)


@app.command()
def build(
    *,
    users: Annotated[Path, typer.Option(help=USERS)],
    out: Out,
    outputs: Annotated[Path | None, typer.Option(help="With LaMP's questions: the outputs file.")] = None,
    exclude: Exclude = None,
    task: Annotated[str, typer.Option(help="Type of the items: news_headline, movie_rating, chat …")],
    anchors: Annotated[int, typer.Option(help="Exact number of anchors.")] = _BUILD.anchors,
    anchors_by: AnchorsBy = _BUILD.anchors_by,
    directions: Directions = _BUILD.directions,
    rank: Annotated[int, typer.Option(help="Rank of every meta-LoRA.")] = _BUILD.rank,
    user_rank: UserRank = _BUILD.user_rank,
    target_modules: Modules = None,
    k: Top = _BUILD.k,
    steps: Annotated[int, typer.Option(help="Optimiser steps per anchor.")] = _BUILD.steps,
    common_steps: Annotated[int, typer.Option(help="Optimiser steps of the common row.")] = _BUILD.common_steps,
    batch_size: Annotated[int, typer.Option(help="Examples per step of an anchor.")] = _BUILD.batch_size,
    common_batch_size: Annotated[int, typer.Option(help="The same for the common row.")] = _BUILD.common_batch_size,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = _BUILD.learning_rate,
    history_share: HistoryShare = _BUILD.history_share,
    acts: ActsFrom = _BUILD.acts,
    max_tokens: Annotated[int, typer.Option(help="Longest training example.")] = _BUILD.max_tokens,
    verdict: Verdict = _BUILD.verdict,
    seed: Annotated[int, typer.Option(help="Random seed; the same inputs and seed give the same bank.")] = _BUILD.seed,
    dtype: Annotated[str, typer.Option(help="Base model's type: auto, bfloat16 or float32.")] = _BUILD.dtype,
    baselines: Annotated[bool, typer.Option("--baselines", help="Also train the task row, for `mta eval`.")] = False,
    ranks: Ranks = None,
    model: Model = None,
    embedder: Embedder = None,
    force: Force = False,
) -> None:
    """Build a bank from people's histories.

    If the build is interrupted, run it again with the same options: it continues and gives the same bank.
    """
    options, settings = _options(BuildOptions, locals()), load_settings(model=model, embedder=embedder)
    prepare_to_train()
    from bank.building.build import build_bank, build_baselines
    from bank.building.progress import RowProgress
    from bank.building.ranks import joined
    from bank.lookup.summary import verdict_text
    from evaluation.verdict import judge_bank
    from server.cli.progress import ConsoleProgress

    given = settings.model, settings.cache_dir, outputs, exclude, settings.embedder, force, settings.chat_template
    inputs = BuildInputs(users, out, *given)
    run = partial(build_bank, inputs, options, RowProgress())
    with ConsoleProgress() as progress:
        try:
            with joined(ranks or _default_ranks(inputs), run) as members:
                manifest = build_bank(inputs, options, RowProgress() if members.rank else progress, members)
            if members.rank:
                return
            manifest = judge_bank(inputs, options, manifest, progress)
            if baselines:
                build_baselines(inputs, options, manifest, progress)
        except KeyboardInterrupt:
            progress.say("stopped; run the same command again to continue with the next row")
            sys.exit(130)
    typer.echo(f"bank {manifest.short} at {out}: {len(manifest.anchors)} anchors, serving rank {manifest.serving_rank}")
    if manifest.verdict:
        typer.echo(verdict_text(manifest.verdict))


@app.command()
def check(
    *,
    users: Annotated[Path, typer.Argument(help=USERS)],
    task: Annotated[str, typer.Option(help="Type of the items: chat, news_headline, movie_rating …")] = "chat",
    anchors: Annotated[int, typer.Option(help="Exact number of anchors.")] = _BUILD.anchors,
    exclude: Exclude = None,
    model: Model = None,
) -> None:
    """Say what a build would take from people's texts, what it would leave out and why, and how long it would take.

    Nothing is built. The time is estimated from one training step, with the default options.
    """
    settings = load_settings(model=model)
    prepare_to_train()
    from bank.building.dry_run import dry_run
    from bank.building.selection import MIN_ITEMS
    from server.cli.progress import ConsoleProgress

    where = settings.model, settings.cache_dir
    inputs = BuildInputs(users, Path(), *where, exclude=exclude, template=settings.chat_template)
    with ConsoleProgress() as progress:
        found = dry_run(inputs, BuildOptions(task, anchors), progress.say)
    only = found.teachers - found.candidates - found.held_out
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row(
        "people",
        f"{found.people}: {found.candidates} can be anchors ({MIN_ITEMS} lessons or more), {only} teach the common row "
        f"alone, {found.held_out} are held out to measure the bank, {found.people - found.teachers} teach nothing",
    )
    why = f" ({found.untaught})" if found.untaught else ""
    table.add_row(
        "items", f"{found.items}: {found.lessons} lessons, {found.items - found.lessons} tell topics alone{why}"
    )
    reasons = Counter(each.why for each in found.left_out)
    examples = {each.why: each.where for each in reversed(found.left_out)}
    table.add_row("left out", "\n".join(f"{n}: {examples[why]} {why}" for why, n in reasons.most_common()) or "nothing")
    needs = f"{anchors} anchors were asked for, but {found.candidates} people can be anchors: give more, or --anchors N"
    takes = needs if found.seconds is None else f"about {found.seconds / 60:.0f} min with {anchors} anchors"
    table.add_row("build", takes)
    Console(highlight=False, markup=False).print(table)
    if found.seconds is None:
        raise typer.Exit(1)


@app.command()
def drafts(
    *,
    users: Annotated[Path, typer.Option(help=USERS)],
    drafts_by: Annotated[str, typer.Option(help="URL of a server of OpenAI's API, which mostly ends with /v1.")],
    drafts_model: Annotated[str, typer.Option(help="The model's name there.")],
    out: Annotated[Path, typer.Option(help="Folder for texts and drafts, to be given to a build as --users.")],
    exclude: Exclude = None,
    task: Annotated[str, typer.Option(help="A type of items with drafts.")] = "rewrite",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask for confirmation.")] = False,
) -> None:
    """Have a model write a draft of each of people's texts, so that a bank learns to turn its drafts into their words.

    The texts are sent to that server, with the key in MTA_DRAFTS_KEY. A run that was stopped continues. Without drafts,
    a build takes a text's content words, names and numbers for one.
    """
    from bank.building.drafting import Drafter, undrafted, write_drafts
    from bank.items.histories import read_excluded, read_histories
    from bank.items.tasks import get_task
    from server.cli.progress import ConsoleProgress

    key = load_settings().drafts_key
    drafter = Drafter(drafts_by, drafts_model, key.get_secret_value() if key else "")
    kind, excluded = get_task(task), read_excluded(exclude) if exclude else frozenset()
    people = [person for person in read_histories(users, kind) if person.user_id not in excluded]
    texts = [text for person in people for text in undrafted(person, kind).values()]
    typer.echo(
        f"{len(texts)} texts of {len(people)} people, {decimal(len(''.join(texts).encode()))}, go to {drafts_by}"
    )
    if not yes:
        typer.confirm("Send them?", abort=True)
    with ConsoleProgress() as progress:
        try:
            without = write_drafts(people, kind, drafter, out, lambda done: progress.piece("drafts", done, len(texts)))
        except KeyboardInterrupt:
            progress.say("stopped; run the same command again to continue with the next text")
            sys.exit(130)
    refused = f"; {without} were refused or did not end: their notes stand for drafts" if without else ""
    typer.echo(f"{len(texts) - without} drafts are in {out}{refused}")


def _default_ranks(inputs: BuildInputs) -> int:
    """Return one rank for each core that memory allows; with GPUs one, since only `torchrun` shares them out."""
    import torch

    from bank.models.folders import ensure_base_model, weight_bytes
    from server.engine.command import memory_bytes

    if torch.cuda.is_available():
        return 1
    each = RANK_BYTES + 2 * weight_bytes(ensure_base_model(inputs.model, inputs.cache_dir))
    return max(1, min(len(os.sched_getaffinity(0)), memory_bytes() // each))


@app.command()
def info(
    bank: BankArgument = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show a bank's anchors, sizes, fingerprint, index, ranks, room for user adapters, and weight rule."""
    from bank.lookup.summary import summarise

    summary = summarise(load_settings(bank=bank).bank_folder())
    if as_json:
        typer.echo(json.dumps(summary, indent=1))
    else:
        _print_summary(summary)


@app.command()
def export(
    anchor: Annotated[str, typer.Option(help="The anchor's id, e.g. a03.")],
    out: Out,
    bank: BankArgument = None,
    with_common: Annotated[bool, typer.Option("--with-common", help="Add the common row, as in a recipe.")] = False,
) -> None:
    """Write an anchor's adapter as a PEFT folder."""
    from bank.peft.exported import export_anchor

    manifest = export_anchor(load_settings(bank=bank).bank_folder(), anchor, out, with_common)
    typer.echo(f"{anchor} is a PEFT adapter at {out}")
    if manifest.shares_prompts:
        typer.echo(f"here it acts {manifest.acts.replace('_', ' ')}; a stock server applies it everywhere")


@app.command()
def remove(
    anchor: Annotated[str, typer.Option(help="The anchor's id, e.g. a03.")],
    out: Out,
    bank: BankArgument = None,
) -> None:
    """Write a bank without one of its anchors; nothing is trained.

    Users' signatures are made again for the new bank, and their adapters are not served until `mta readapt`.
    """
    from bank.building.removal import remove_anchor

    manifest = remove_anchor(load_settings(bank=bank).bank_folder(), anchor, out)
    typer.echo(
        f"bank {manifest.short} at {out}: {len(manifest.anchors)} anchors, without {anchor}. Its common row still "
        "knows what it learnt from that person, until the bank is built again without them (--exclude)."
    )


@app.command("import")
def import_(
    *,
    adapters: Annotated[list[Path], typer.Argument(help="PEFT folders; they become a00, a01, … in this order.")],
    profiles: Annotated[Path, typer.Option(help="In LaMP's per-user layout; a user_id is the name of a PEFT folder.")],
    out: Out,
    task: Annotated[str, typer.Option(help="Type of the profiles' items.")] = _IMPORT.task,
    user_rank: UserRank = _IMPORT.user_rank,
    k: Top = _IMPORT.k,
    model: Model = None,
    embedder: Embedder = None,
    force: Force = False,
) -> None:
    """Make a bank from PEFT adapters and their profiles."""
    options, settings = _options(ImportOptions, locals()), load_settings(model=model, embedder=embedder)
    from bank.lookup import embedder as embedders
    from bank.manifest import MANIFEST_FILE
    from bank.models.folders import ensure_base_model, ensure_embedder
    from bank.peft.imported import import_bank

    if (out / MANIFEST_FILE).exists() and not force:
        raise BankError(f"{out} already holds a bank: choose another --out, or replace it with --force")
    folder = ensure_base_model(settings.model, settings.cache_dir, template=settings.chat_template)
    encoder = embedders.Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir))
    name = settings.model
    manifest = import_bank(adapters, profiles, out, options, model_folder=folder, base_model=name, embedder=encoder)
    typer.echo(f"bank {manifest.short} at {out}: {len(manifest.anchors)} anchors, serving rank {manifest.serving_rank}")


def _options(kind: type[T], parameters: Mapping[str, Any]) -> T:
    return kind(**{field.name: parameters[field.name] for field in fields(kind)})


def _print_summary(summary: Mapping[str, Any]) -> None:
    base, embedder, index, weights = (summary[key] for key in ("base_model", "embedder", "index", "weights"))
    sizes = ", ".join(f"{name} {decimal(count)}" for name, count in summary["bytes"].items())
    common = "with a common row" if summary["common"] else "no common row"
    facts = {
        "bank": summary["folder"],
        "fingerprint": summary["fingerprint"],
        "task": summary["task"],
        "base model": f"{base['name']} ({base['hash'][:12]}…), revision {base.get('revision', 'not known')}",
        "embedder": f"{embedder['id']}, {embedder['dim']} dimensions",
        "method": f"{summary['method']}, {common}",
        "adapted": f"{summary['modules']} modules: {', '.join(summary['target_modules'])}",
        "weights": _describe_rule(weights),
        "phrases": _describe_phrases(summary),
        "index": f"{index['kind']}, {index['anchors']} anchors of {index['dim']} dimensions",
        "rows": f"{summary['directions']} directions" if summary["directions"] else "the anchors' own",
        "acts": summary["acts"].replace("_", " "),
        "rank": f"{summary['rank']} per row, {summary['fused_rank']} fused, {summary['serving_rank']} served; "
        f"user adapters: up to rank {summary['room']}",
        "size": f"{sizes}; {decimal(summary['row_bytes'])} per row",
        "training": ", ".join(f"{key} {value}" for key, value in summary["training"].items() if value is not None),
        "verdict": summary["in_words"],
    }
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in facts.items():
        table.add_row(name, value)
    anchors = Table("anchor", "items", title=f"{len(summary['anchors'])} anchors", title_justify="left")
    for anchor in summary["anchors"]:
        anchors.add_row(anchor["id"], str(anchor["items"]))
    Console(highlight=False, markup=False).print(table, anchors, sep="\n")


def _describe_phrases(summary: Mapping[str, Any]) -> str:
    if not (rule := summary.get("phrases")):
        return "none: built without, or imported"
    trust, gain = ", ".join(f"{each:.2f}" for each in rule["trust"]), rule["gain"]
    used = "used" if summary["words_default"] else "not used"
    return (
        f"{used} by default, trust {trust} by length; they change the loss of {rule['people']} people's later items by "
        f"{gain['mean']:+.3f} ({gain['low']:+.3f} to {gain['high']:+.3f})"
    )


def _describe_rule(weights: Mapping[str, Any]) -> str:
    topic = f"topic, at most {weights['anchors']} anchors, strength {weights['strength']:g}"
    if posterior := weights["posterior"]:
        return f"posterior, decay {posterior['decay']:.4g}; until there is a signature, {topic}"
    return topic
