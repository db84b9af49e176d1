"""For tasks whose answers are scores: how far from the truth is the score that a model expects, and what does it add to
a person's habit?

`mta eval` judges the likeliest score, as LaMP does: of two that are nearly equally likely it sees only one. Here a
model is asked how likely each score is, and the mean of that distribution is what it expects.

A habit needs no model (`prior`), and what a model knows of a person is for a part the same habit. So each method is
also asked with the habit on top: each score's chance times how much likelier the person's histogram makes it than
everybody's. In an engine that is a bias on five logits, a field of the request.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer
from rich.progress import track

from adapters.training.adapt_config import AdaptConfig
from bank.evaluation.adapters import Adapters
from bank.evaluation.methods import Base, parse_methods
from bank.evaluation.people import Person, asked, read_people
from bank.evaluation.report.intervals import against_one
from bank.evaluation.report.metrics import HIGHEST, LOWEST
from bank.evaluation.scoring import Scorer
from bank.evaluation.speakers import OpenBank
from bank.lookup.embedder import Embedder
from bank.lookup.prior import personal_shares
from bank.models.folders import ensure_base_model, ensure_embedder
from bank.models.load import load_base, resolve_dtype
from bench import script
from bench.page.report import console, report
from bench.rig.subject import ModelOption
from server.settings import load_settings

MAX_TOKENS = 512
SCORES = range(int(LOWEST), int(HIGHEST) + 1)
TOKENS = 2
"""Of an answer: the score and the end of the turn, which costs nothing."""

PRIOR, BIASED = "prior", "+prior"

Chances = Mapping[int, float]
"""How likely each score is."""


def main(
    *,
    bank: Annotated[
        Path, typer.Option(help="A bank of a task whose answers are scores; for `task` built with --baselines.")
    ],
    users: Annotated[Path, typer.Option(help="People with queries.")],
    people: Annotated[int | None, typer.Option(help="Only the first N people.", min=2, show_default="all")] = None,
    methods: Annotated[
        str, typer.Option(help="Comma-separated; only methods without training.")
    ] = "task,mean,merged:topic,merged",
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Report each method's loss and mean absolute error of the expected score, and both less those of the ones above.

    Intervals and stars are those of `mta eval`. The loss is that of the gold score among the five, over the answer's
    tokens, so that it stands on the scale of `mta eval`.
    """
    settings, compared = load_settings(model=model), parse_methods(methods)
    embedder = Embedder.load(ensure_embedder(settings.embedder, settings.cache_dir))
    here = OpenBank.open(bank, embedder.id)
    further = any(method.base is Base.TASK for method in compared)
    task_bank = here.of_task(embedder.id) if further else None
    task = here.serving.task
    if task.kind != "score":
        raise typer.BadParameter(f"the bank is for {task.name}, whose answers are not scores", param_hint="--bank")
    scorer = Scorer(*load_base(ensure_base_model(settings.model, settings.cache_dir), resolve_dtype("auto")))
    plan = AdaptConfig()
    ids = [one for score in SCORES for one in scorer.tokenizer.encode(str(score), add_special_tokens=False)]
    if len(ids) != len(SCORES):
        raise typer.BadParameter("its scores have more than one token", param_hint="--model")
    adapters = Adapters(here, task_bank, scorer, embedder, plan=plan, strength=plan.strength, max_tokens=MAX_TOKENS)
    prior = here.manifest.prior
    assert prior, "every bank of scores has one"
    errors: dict[str, list[float]] = defaultdict(list)
    losses: dict[str, list[float]] = defaultdict(list)

    def note(name: str, person: Person, chances: Sequence[Chances]) -> None:
        golds = [int(query.gold) for query in person.queries]
        errors[name].append(fmean(abs(_expected(c) - gold) for c, gold in zip(chances, golds, strict=True)))
        losses[name].append(fmean(-math.log(c[gold]) / TOKENS for c, gold in zip(chances, golds, strict=True)))

    for person in track(read_people(users, task)[:people], "asking", console=console()):
        evidence = adapters.evidence(person)
        shares = personal_shares(prior, [answer for _, answer in person.history.pairs(task)])
        habit = {score: shares[str(score)] for score in SCORES}
        note(PRIOR, person, [habit] * len(person.queries))
        for method in compared:
            adapter = adapters.make(method, evidence, seed=0)
            examples = asked(scorer.tokenizer, task, person, method.history, MAX_TOKENS)
            found = [_shares(each) for each in scorer.chances(adapter, examples, ids)]
            note(method.name, person, found)
            note(method.name + BIASED, person, [_biased(chances, habit, prior.shares) for chances in found])
    scorer.bare()  # as in `bank.evaluation.session`
    rows = [*_rows("loss", losses), *_rows("error of the expected score", errors)]
    report(f"Scores: losses and errors of {len(losses[PRIOR])} people", rows, out, losses=losses, errors=errors)


def _rows(what: str, found: Mapping[str, Sequence[float]]) -> list[tuple[str, object]]:
    """Each method's mean over people, then its differences to those before it."""
    rows: list[tuple[str, object]] = [(f"{name}: {what}", f"{fmean(each):.4f}") for name, each in found.items()]
    for place, (other, theirs) in enumerate(found.items()):
        later = list(found.items())[place + 1 :]
        differences = {name: [mine - their for mine, their in zip(each, theirs, strict=True)] for name, each in later}
        compared = against_one(differences).items()
        rows += [(f"{what}: {name} less {other}", str(interval)) for name, interval in compared]
    return rows


def _shares(chances: Sequence[float]) -> Chances:
    """How likely the model finds each score among the scores."""
    return {score: chance / sum(chances) for score, chance in zip(SCORES, chances, strict=True)}


def _biased(chances: Chances, habit: Chances, everybody: Mapping[str, float]) -> Chances:
    """Chances with a person's habit on top."""
    moved = {score: chances[score] * habit[score] / everybody[str(score)] for score in SCORES}
    return {score: chance / sum(moved.values()) for score, chance in moved.items()}


def _expected(chances: Chances) -> float:
    """The mean of the scores, each weighted by how likely it is."""
    return sum(score * chance for score, chance in chances.items())


if __name__ == "__main__":
    script(main)
