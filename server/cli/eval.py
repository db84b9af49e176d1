"""`mta eval`: measure how well a bank personalises, with every method for every user, in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from server.cli.shared import Embedder, Model, prepare_to_train

if TYPE_CHECKING:
    from evaluation.authorship import AuthorshipRow
    from evaluation.intervals import Interval
    from evaluation.summary import MethodRow

_OPTIONAL = ("prior", "random", "common", "mean")  # columns to drop on narrow terminals, in this order; rows stay

Methods = Annotated[str | None, typer.Option(help="Comma-separated; see docs/quality.md.", show_default="all")]
Out = Annotated[Path, typer.Option(help="Folder for records, table and pictures; an interrupted run continues there.")]
Sample = Annotated[int, typer.Option(help="People for the costly parts: few-shot adapters, curves, texts.", min=2)]
Predict = Annotated[bool, typer.Option("--predict/--no-predict", help="Generate answers, for LaMP's metrics.")]
Curves = Annotated[bool, typer.Option("--curves/--no-curves", help="Also measure merged with other k and fewer items.")]
Write = Annotated[str | None, typer.Option(help="Comma-separated methods that also write texts, for authorship.")]
Last = Annotated[int, typer.Option(help="Use each person's last N items as queries instead of reading them.", min=0)]


def evaluate(
    users: Annotated[Path, typer.Option(help="People with profiles and queries, in LaMP's per-user layout.")],
    bank: Annotated[Path, typer.Option(help="The bank to evaluate.")],
    out: Out,
    methods: Methods = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds for random or trained methods.", min=1)] = 1,
    people: Annotated[int | None, typer.Option(help="Only the first N people.", min=2, show_default="all")] = None,
    sample: Sample = 10,
    predict: Predict = True,
    curves: Curves = True,
    write: Write = None,
    texts: Annotated[int, typer.Option(help="With --write: number of texts per query.", min=1)] = 3,
    last: Last = 0,
    profile: Annotated[int, typer.Option(help="With --last: number of earlier items in the profile.", min=1)] = 10,
    only: Annotated[Path | None, typer.Option(help="Only these people: a file of ids.", show_default="all")] = None,
    model: Model = None,
    embedder: Embedder = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
) -> None:
    """Compare methods of personalisation on people's own later answers; a lower loss is better."""
    prepare_to_train()
    from adapters.training.adapt_config import AdaptConfig
    from bank.items.tasks import get_task
    from bank.lookup.embedder import Embedder
    from bank.manifest import read_manifest
    from bank.models.folders import ensure_base_model, ensure_embedder
    from evaluation.methods import default_methods, parse_methods
    from evaluation.session import EvalInputs, EvalOptions
    from evaluation.session import evaluate as run
    from server.cli.progress import ConsoleProgress
    from server.settings import load_settings

    manifest = read_manifest(bank)
    kind = get_task(manifest.task).kind
    chosen = parse_methods(methods) if methods else default_methods(kind, words=manifest.phrases is not None)
    writing = parse_methods(write) if write else []
    if writing and kind != "text":
        raise typer.BadParameter(f"this bank's answers are {kind}, not free text", param_hint="--write")
    options = EvalOptions(tuple(dict.fromkeys([*chosen, *writing])), seeds, predict, sample, tuple(writing), texts)
    settings = load_settings(model=model, embedder=embedder)
    folder = ensure_base_model(settings.model, settings.cache_dir, manifest.base_model, settings.chat_template)
    encoder = Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir))
    inputs = EvalInputs(users, bank, out, folder, encoder, people, only, last, profile, dtype, curves)
    with ConsoleProgress() as progress:
        tables, authorship = run(inputs, options, AdaptConfig(), partial(progress.piece, "evaluating"))
    console = Console(highlight=False)
    print_tables(tables, console)
    print_authorship(authorship, console)
    console.print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}", markup=False)


def print_tables(tables: Mapping[str, Sequence[MethodRow]], console: Console) -> None:
    """Print each table of methods under its title, with a table of costs; intervals do not fit on a line."""
    from evaluation.intervals import LEVEL
    from evaluation.session import TABLE_FILE

    for title, rows in tables.items():
        prices = [(row.method, f"{row.prompt_tokens:.0f}", row.first_ms, f"{row.kept_bytes:,.0f}") for row in rows]
        heads = ("prompt tokens", "ms to first token", "bytes stored")
        console.print(_losses(title, rows, console.width), "", _table(None, heads, prices), "", sep="\n")
    console.print(
        "Columns: loss in nats per token, lower is better; the task's metrics; the loss minus another method's, with a "
        f"star if the difference is significant: p below {LEVEL} in a paired sign-flip test over people, after "
        f"Holm's correction for all methods in the column. The 95 % intervals are in {TABLE_FILE}."
    )


def print_authorship(rows: Sequence[AuthorshipRow], console: Console) -> None:
    for judge, group in groupby(rows, lambda row: row.judge):
        group_rows = list(group)
        lines = [(row.method, f"{row.named.mean:.1%}", f"{row.rank.mean:.2f}") for row in group_rows]
        title = f"authorship, {group_rows[0].named.n} people, judged by {judge}"
        console.print(_table(title, ("right person first", "mean rank"), lines))


def _losses(title: str, rows: Sequence[MethodRow], width: int) -> Table:
    from evaluation.summary import columns

    metrics, compared = columns(rows)
    names = max(len(row.method) for row in rows) + 1
    room = (width - names - len(" 0.000") * (1 + len(metrics))) // len(" -0.000*")
    for optional in _OPTIONAL:
        compared = [name for name in compared if name != optional or len(compared) <= room]
    lines = [
        (
            row.method,
            f"{row.loss:.3f}",
            *(f"{row.metrics[name]:.3f}" if name in row.metrics else "" for name in metrics),
            *(_gain(row.against.get(name)) for name in compared),
        )
        for row in rows
    ]
    heads = ("loss", *metrics, *("less\n" + other.replace(":", ":\n") for other in compared))
    return _table(title, heads, lines)


def _table(title: str | None, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right", vertical="bottom")
    for line in lines:
        table.add_row(*line)
    return table


def _gain(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"[bold]{interval.mean:+.3f}*[/bold]" if interval.significant else f"{interval.mean:+.3f} "
