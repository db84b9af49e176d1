"""One result, two evaluators: `mta eval` in process against `mta eval` through a running vLLM, query by query.

Both score the same gold answers of the same people in float32: in process with the adapter put on the model, in the
engine under the recipe's name by vLLM's `prompt_logprobs`. The losses must agree, and the methods rank alike.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Annotated

import typer
from rich.progress import Progress

from bank.building.baselines import BASELINES
from bank.evaluation.methods import parse_methods
from bank.evaluation.records import RECORDS_FILE, Record
from bank.evaluation.run import EvalOptions
from bank.evaluation.scoring import Scores
from bank.evaluation.session import EvalInputs, evaluate
from bank.lookup.embedder import Embedder
from bank.manifest import read_manifest
from bank.models.folders import ensure_base_model, ensure_embedder
from bench.quality import methods_of
from bench.report import report
from bench.rig.engine import KEY, running_engine
from bench.rig.valkey import ValkeyProcess
from server.cli.eval.engine import EngineScores
from server.settings import Settings
from server.store.opening import open_stores
from server.store.samples import AdaptConfig
from server.worker.training import user_plan

AGREE = 0.01
"""Largest difference between two losses that agree, nats per token."""


def main(
    *,
    bank: Annotated[Path, typer.Option(help="A bank built with --baselines.")],
    users: Annotated[Path, typer.Option(help="People with queries.")],
    people: Annotated[int, typer.Option(help="How many people.", min=2)] = 5,
    methods: Annotated[str | None, typer.Option(help="Comma-separated.", show_default="all of the task's")] = None,
    model: Annotated[str, typer.Option(help="Base model: folder, hub id or `default`.")] = "default",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Report the largest differences in loss, and the ranking of the methods."""
    chosen = parse_methods(methods or methods_of(read_manifest(bank).task))
    cache, options = Settings().cache_dir, EvalOptions(tuple(chosen), (0,), predict=False)
    folder, embedder = ensure_base_model(model, cache), Embedder.load(ensure_embedder(None, cache))
    with tempfile.TemporaryDirectory() as scratch, Progress() as progress:

        def run(name: str, engine: Scores | None = None) -> dict[tuple[str, str, str], Record]:
            inputs = EvalInputs(
                users=users,
                bank=bank,
                out=Path(scratch) / name,
                model_folder=folder,
                embedder=embedder,
                people=people,
                dtype="float32",
            )
            bar = progress.add_task(name)

            def begin(pieces: int) -> Callable[[int], None]:
                progress.update(bar, total=pieces)
                return lambda done: progress.advance(bar, done)

            config = AdaptConfig()
            evaluate(inputs, options, user_plan(config), begin, engine, strength=config.strength)
            lines = (inputs.out / RECORDS_FILE).read_text("utf-8").splitlines()
            return {(r.method, r.user_id, r.query_id): r for r in (Record(**json.loads(line)) for line in lines)}

        here = run("in process")
        valkey = ValkeyProcess(Path(scratch)).start()
        try:
            stores = partial(open_stores, Settings(redis_url=valkey.url), checked=False)
            serving = {"dtype": "float32", "next_bank": bank / BASELINES, "redis_url": valkey.url}
            with (
                running_engine(bank, folder, **serving) as engine,
                EngineScores(engine.url, KEY, stores) as scores,
            ):
                there = run("in the engine", scores)
        finally:
            valkey.kill()
    gaps: dict[str, float] = defaultdict(float)
    for key, record in here.items():
        gaps[record.method] = max(gaps[record.method], abs(record.loss - there[key].loss))
    rankings = [_ranking(list(found.values())) for found in (here, there)]
    rows: list[tuple[str, object]] = [(f"{name}: largest difference", f"{gap:.1e}") for name, gap in gaps.items()]
    rows += [("ranking in process", " > ".join(rankings[0])), ("ranking in the engine", " > ".join(rankings[1]))]
    rows.append(("the same ranking", rankings[0] == rankings[1]))
    report(f"Two evaluators, float32: {people} people of {users.name}, losses in nats per token", rows, out)
    if rankings[0] != rankings[1] or max(gaps.values()) > AGREE:
        raise typer.Exit(1)


def _ranking(records: Sequence[Record]) -> Sequence[str]:
    """Methods, the best first."""
    losses: dict[str, list[float]] = defaultdict(list)
    for record in records:
        losses[record.method].append(record.loss)
    return sorted(losses, key=lambda name: mean(losses[name]))


if __name__ == "__main__":
    typer.run(main)
