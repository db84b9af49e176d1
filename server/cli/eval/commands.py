"""`mta eval`: measure how well a bank personalises, with every method for every user, in one table."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from server.cli.shared import prepare_to_train

Methods = Annotated[str | None, typer.Option(help="Comma-separated; see docs/quality.md.", show_default="all")]
SampleSize = Annotated[
    int, typer.Option(help="Number of people for the costly parts: few-shot adapters, curves, texts.", min=2)
]
Predict = Annotated[bool, typer.Option("--predict/--no-predict", help="Generate answers, for LaMP's metrics.")]
Curves = Annotated[
    bool, typer.Option("--curves/--no-curves", help="Also evaluate merged with other k and with fewer items.")
]
Write = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated methods that also generate longer texts, for the authorship test.",
        show_default="none",
    ),
]
Last = Annotated[
    int, typer.Option(help="Make the queries from each person's last N items, instead of reading them.", min=0)
]
EngineUrl = Annotated[
    str | None,
    typer.Option(help="Evaluate through this running engine; its key is MTA_ENGINE_KEY.", show_default=False),
]


def evaluate(
    users: Annotated[Path, typer.Option(help="People with profiles and queries, in LaMP's per-user layout.")],
    bank: Annotated[Path, typer.Option(help="The bank to evaluate.")],
    out: Annotated[
        Path, typer.Option(help="Folder for records, table and pictures; an interrupted run continues there.")
    ],
    methods: Methods = None,
    seeds: Annotated[int, typer.Option(help="Number of seeds for random or trained methods.", min=1)] = 1,
    people: Annotated[int | None, typer.Option(help="Only the first N people.", min=2, show_default="all")] = None,
    sample: SampleSize = 10,
    predict: Predict = True,
    curves: Curves = True,
    write: Write = None,
    texts: Annotated[int, typer.Option(help="With --write: number of texts per query.", min=1)] = 3,
    last: Last = 0,
    profile: Annotated[int, typer.Option(help="With --last: number of earlier items in the profile.", min=1)] = 10,
    only: Annotated[Path | None, typer.Option(help="Only these people: a file of ids.", show_default="all")] = None,
    model: Annotated[str | None, typer.Option(help="Base model.", show_default="MTA_MODEL")] = None,
    embedder: Annotated[Path | None, typer.Option(help="Folder of the embedder.", show_default="MTA_EMBEDDER")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32; an engine uses its own.")] = "auto",
    engine_url: EngineUrl = None,
    redis_url: Annotated[str | None, typer.Option(help="The engine's store.", show_default="MTA_REDIS_URL")] = None,
) -> None:
    """Compare methods of personalisation on people's own later answers; a lower loss is better."""
    prepare_to_train()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from adapters.training.adapt_config import AdaptConfig
    from bank.evaluation.methods import default_methods, parse_methods
    from bank.evaluation.run import EvalOptions
    from bank.evaluation.session import EvalInputs
    from bank.evaluation.session import evaluate as run
    from bank.items.tasks import get_task
    from bank.lookup.embedder import Embedder
    from bank.manifest import read_manifest
    from bank.models.folders import ensure_base_model, ensure_embedder
    from server.cli.eval.engine import open_engine_reader
    from server.cli.eval.tables import print_authorship, print_tables
    from server.settings import load_settings

    kind = get_task(read_manifest(bank).task).kind
    chosen = parse_methods(methods) if methods else default_methods(kind)
    writing = parse_methods(write) if write else []
    if writing and kind != "text":
        raise typer.BadParameter(f"this bank's answers are {kind}, not free text", param_hint="--write")
    chosen = list(dict.fromkeys([*chosen, *writing]))
    options = EvalOptions(tuple(chosen), seeds, predict, sample, tuple(writing), texts)
    settings = load_settings(model=model, embedder=embedder, redis_url=redis_url)
    inputs = EvalInputs(
        users=users,
        bank=bank,
        out=out,
        model_folder=ensure_base_model(settings.model, settings.cache_dir),
        embedder=Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir)),
        people=people,
        only=only,
        last=last,
        profile=profile,
        dtype=dtype,
        curves=curves,
    )
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    opened = open_engine_reader(engine_url, settings) if engine_url else nullcontext()
    with Progress(*columns, console=console) as progress, opened as engine:
        bar = progress.add_task("evaluating", total=None)

        def show(done: int, total: int) -> None:
            progress.update(bar, completed=done, total=total)

        tables, authorship = run(inputs, options, AdaptConfig(), show, engine)
    print_tables(tables, console)
    print_authorship(authorship, console)
    console.print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
