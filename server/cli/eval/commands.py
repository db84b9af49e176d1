"""`mta eval`: does a bank personalise? Every method over every user, in one table."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from server.cli.process import prepare_to_train

TaskName = Annotated[str | None, typer.Option(help="Must be the bank's.", show_default="the bank's")]
Methods = Annotated[str | None, typer.Option(help="Comma-separated; see docs/quality.md.", show_default="all")]
Predict = Annotated[bool, typer.Option("--predict/--no-predict", help="Generate answers, for LaMP's metrics.")]
Curves = Annotated[bool, typer.Option("--curves/--no-curves", help="Merged with other k and fewer items too.")]
SampleSize = Annotated[
    int,
    typer.Option(help="What is costly (few-shot adapters, curves, texts) for the first so many people only.", min=2),
]
EngineUrl = Annotated[
    str | None, typer.Option(help="A running engine answers instead; its key is MTA_ENGINE_KEY.", show_default=False)
]
Last = Annotated[int, typer.Option(help="Without queries in the file: make them of each one's last items.", min=0)]


def evaluate(
    users: Annotated[Path, typer.Option(help="People with profile and queries: LaMP's per-user layout.")],
    bank: Annotated[Path, typer.Option(help="The bank to evaluate.")],
    out: Annotated[Path, typer.Option(help="Folder of records, table and pictures; a killed run goes on there.")],
    task: TaskName = None,
    methods: Methods = None,
    seeds: Annotated[int, typer.Option(help="Runs that differ in what is random or trained.", min=1)] = 1,
    people: Annotated[int | None, typer.Option(help="Only the first so many.", min=2, show_default="all")] = None,
    sample: SampleSize = 10,
    predict: Predict = True,
    curves: Curves = True,
    last: Last = 0,
    profile: Annotated[int, typer.Option(help="With --last: the items before them that are the profile.", min=1)] = 10,
    only: Annotated[Path | None, typer.Option(help="Only these people: a file of ids.", show_default="all")] = None,
    model: Annotated[str | None, typer.Option(help="Base model.", show_default="MTA_MODEL")] = None,
    embedder: Annotated[Path | None, typer.Option(help="Embedder's folder.", show_default="MTA_EMBEDDER")] = None,
    dtype: Annotated[str, typer.Option(help="auto, bfloat16 or float32; of an engine its own.")] = "auto",
    engine_url: EngineUrl = None,
    redis_url: Annotated[str | None, typer.Option(help="The engine's store; MTA_REDIS_URL.")] = None,
) -> None:
    """Compare methods of personalisation on people's own later answers, in process; a lower loss is better."""
    prepare_to_train()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from bank.evaluation.methods import DEFAULT, parse_methods
    from bank.evaluation.run import EvalOptions
    from bank.evaluation.session import EvalInputs
    from bank.evaluation.session import evaluate as run
    from bank.lookup.embedder import Embedder
    from bank.models.folders import ensure_base_model, ensure_embedder
    from server.cli.eval.engine import EngineScores
    from server.cli.eval.tables import print_tables
    from server.settings import load_settings
    from server.store.opening import open_stores
    from server.store.samples import AdaptConfig
    from server.worker.training import user_plan

    options = EvalOptions(tuple(parse_methods(methods or DEFAULT)), tuple(range(seeds)), predict, sample)
    config = AdaptConfig()
    settings = load_settings(model=model, embedder=embedder, redis_url=redis_url)
    inputs = EvalInputs(
        users=users,
        bank=bank,
        out=out,
        model_folder=ensure_base_model(settings.model, settings.cache_dir),
        embedder=Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir)),
        task=task,
        people=people,
        only=only,
        last=last,
        profile=profile,
        dtype=dtype,
        curves=curves,
    )
    console = Console(highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    key = settings.engine_key.get_secret_value() if settings.engine_key else None
    stores = partial(open_stores, settings, checked=False)
    opened = EngineScores(engine_url, key, stores) if engine_url else nullcontext()
    with Progress(*columns, console=console) as progress, opened as engine:

        def begin(pieces: int) -> Callable[[int], None]:
            bar = progress.add_task("evaluating", total=pieces)
            return lambda done: progress.advance(bar, done)

        found = run(inputs, options, user_plan(config), begin, engine, strength=config.strength)
    print_tables(found, console)
    console.print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
