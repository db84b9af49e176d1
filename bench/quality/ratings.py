"""For tasks whose answers are scores: how far from the truth is the score that a model expects?

`mta eval` judges the likeliest score, as LaMP does: of two that are nearly equally likely it sees only one. Here a
model is asked how likely each score is, and the mean of that distribution is what it expects.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.progress import track

from bank.building.baselines import BASELINES
from bank.evaluation.adapters import Adapters
from bank.evaluation.methods import parse_methods
from bank.evaluation.people import read_people
from bank.evaluation.report.intervals import against_one
from bank.evaluation.report.metrics import HIGHEST, LOWEST
from bank.evaluation.scoring import Scorer
from bank.evaluation.speakers import OpenBank, PersonAdapter
from bank.items.prompt import encode_pair
from bank.lookup.embedder import Embedder
from bank.models.folders import ensure_base_model, ensure_embedder
from bank.models.load import load_base, resolve_dtype
from bench import script
from bench.page.report import console, report
from server.settings import Settings
from server.store.samples import AdaptConfig
from server.worker.training import user_plan

MAX_TOKENS = 512
SCORES = range(int(LOWEST), int(HIGHEST) + 1)


def main(
    *,
    bank: Annotated[Path, typer.Option(help="A bank of a task whose answers are scores, built with --baselines.")],
    users: Annotated[Path, typer.Option(help="People with queries.")],
    people: Annotated[int | None, typer.Option(help="Only the first N people.", min=2, show_default="all")] = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; only methods without training.")
    ] = "task,mean,merged:topic,merged",
    model: Annotated[str, typer.Option(help="Base model: folder, hub id or `default`.")] = "default",
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Report each method's mean absolute error of the expected score, and that less the others', with 95 % intervals.

    A star marks a difference that is sure, as in `mta eval`.
    """
    cache, compared = Settings().cache_dir, parse_methods(methods)
    embedder = Embedder.load(ensure_embedder(None, cache))
    here, task_bank = OpenBank.open(bank, embedder.id), OpenBank.open(bank / BASELINES, embedder.id)
    task = here.serving.task
    if task.kind != "score":
        raise typer.BadParameter(f"the bank is for {task.name}, whose answers are not scores", param_hint="--bank")
    scorer = Scorer(*load_base(ensure_base_model(model, cache), resolve_dtype("auto")))
    config = AdaptConfig()
    plan, strength = user_plan(config), config.strength
    adapters = Adapters(here, task_bank, scorer, embedder, plan=plan, strength=strength, max_tokens=MAX_TOKENS)
    errors: dict[str, list[float]] = defaultdict(list)
    for person in track(read_people(users, task)[:people], "asking", console=console()):
        evidence = adapters.evidence(person)
        for method in compared:
            adapter = adapters.make(method, evidence, seed=0)
            found = [abs(_expected(scorer, adapter, query.input) - float(query.gold)) for query in person.queries]
            errors[method.name].append(float(np.mean(found)))
    scorer.bare()  # as in `bank.evaluation.session`
    rows: list[tuple[str, object]] = [(name, f"{np.mean(each):.4f}") for name, each in errors.items()]
    for other, theirs in errors.items():
        differences = {
            name: [mine - their for mine, their in zip(each, theirs, strict=True)]
            for name, each in errors.items()
            if name != other
        }
        rows += [(f"{name} less {other}", str(interval)) for name, interval in against_one(differences).items()]
    report(f"Mean absolute error of the expected score, {len(next(iter(errors.values())))} people", rows, out)


def _expected(scorer: Scorer, adapter: PersonAdapter | None, turn: str) -> float:
    """The mean of the scores, each weighted by how likely its answer is."""
    examples = [encode_pair(scorer.tokenizer, turn, str(score), MAX_TOKENS) for score in SCORES]
    readings = scorer.read(adapter, examples)
    chances = [math.exp(-reading.loss * e.output_tokens) for reading, e in zip(readings, examples, strict=True)]
    return sum(score * chance for score, chance in zip(SCORES, chances, strict=True)) / sum(chances)


if __name__ == "__main__":
    script(main)
