"""Measure the error of the expected score for tasks whose answers are scores, and the gain over a person's habit.

`mta eval` judges the most likely score, as LaMP does, and ignores a second score that is nearly as likely. Its records
also have the probability of each score; the mean of that distribution is the expected score.

A person's habit (`prior`) needs no model, and a model of a person partly learns the same habit. So each method is also
judged with the habit added: each score's probability is multiplied by the ratio of the person's histogram to
everybody's. An engine can do this with a bias on five logits, a field of the request.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated

import typer

from bank.items.tasks import get_task
from bank.lookup.prior import SCORES
from bank.manifest import read_manifest
from bench import script
from bench.page.report import report
from bench.rig.subject import ModelOption
from evaluation.intervals import compare_together
from evaluation.run import RECORDS_FILE, Record, read_records
from evaluation.studies import mta

TOKENS = 2
"""Tokens of an answer: the score, and the end of the turn, whose loss is zero."""

PRIOR, BIASED = "prior", "+prior"
EVERYBODY = 1_000_000

Chances = Mapping[str, float]
"""Probability of each score."""

Figures = Mapping[str, Mapping[str, list[float]]]
"""One figure per query, by method and person."""


def main(
    *,
    bank: Annotated[
        Path, typer.Option(help="A bank of a task whose answers are scores; for `task` built with --baselines.")
    ],
    users: Annotated[Path, typer.Option(help="People with queries.")],
    people: Annotated[int | None, typer.Option(help="Only the first N people.", min=2, show_default="all")] = None,
    methods: Annotated[str, typer.Option(help="Comma-separated.")] = "task,mean,merged:topic,merged",
    model: ModelOption = None,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
) -> None:
    """Report each method's loss and mean absolute error of the expected score, and the differences between methods.

    Intervals and stars are those of `mta eval`. The loss is that of the gold score among the five, divided by the
    answer's tokens, as in `mta eval`.
    """
    manifest = read_manifest(bank)
    if get_task(manifest.task).kind != "score" or not manifest.prior:
        raise typer.BadParameter(f"the bank is for {manifest.task}, whose answers are not scores", param_hint="--bank")
    further = [*(["--people", people] if people else []), *(["--model", model] if model else [])]
    with tempfile.TemporaryDirectory() as scratch:
        mta("eval", "--users", users, "--bank", bank, "--out", scratch, "--methods", f"{PRIOR},{methods}",
            "--no-predict", "--no-curves", "--sample", EVERYBODY, *further)  # fmt: skip
        records = list(read_records(Path(scratch) / RECORDS_FILE))
    if not all(record.chances for record in records):
        raise typer.BadParameter("its scores have more than one token", param_hint="--model")
    errors, losses = judged(records, manifest.prior.shares)
    rows = [*_rows("loss", losses), *_rows("error of the expected score", errors)]
    report(f"Scores: losses and errors of {len(losses[PRIOR])} people", rows, out, losses=losses, errors=errors)


def judged(records: Sequence[Record], everybody: Chances) -> tuple[Figures, Figures]:
    """Return the errors of the expected score and the losses of each method, with and without the habit."""
    errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    losses: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    habits = {(r.user_id, r.query_id): _shares(r.chances) for r in records if r.method == PRIOR}
    for record in records:
        chances = _shares(record.chances)
        judged = {record.method: chances}
        if record.method != PRIOR:
            habit = habits[record.user_id, record.query_id]
            judged[record.method + BIASED] = _biased(chances, habit, everybody)
        for name, each in judged.items():
            expected = sum(int(score) * chance for score, chance in each.items())
            errors[name][record.user_id].append(abs(expected - int(record.gold)))
            losses[name][record.user_id].append(-math.log(each[record.gold]) / TOKENS)
    return errors, losses


def _rows(what: str, found: Figures) -> list[tuple[str, object]]:
    """Return rows with each method's mean over people, then with its differences to the earlier methods."""
    means = {name: [fmean(queries) for queries in people.values()] for name, people in found.items()}
    rows: list[tuple[str, object]] = [(f"{name}: {what}", f"{fmean(each):.4f}") for name, each in means.items()]
    for position, (other, theirs) in enumerate(means.items()):
        later = list(means.items())[position + 1 :]
        differences = {name: [mine - their for mine, their in zip(each, theirs, strict=True)] for name, each in later}
        compared = compare_together(differences).items()
        rows += [(f"{what}: {name} less {other}", str(interval)) for name, interval in compared]
    return rows


def _shares(chances: Sequence[float]) -> Chances:
    """Normalise the probabilities of the scores."""
    return {score: chance / sum(chances) for score, chance in zip(SCORES, chances, strict=True)}


def _biased(chances: Chances, habit: Chances, everybody: Chances) -> Chances:
    """Return probabilities with a person's habit added."""
    moved = {score: chances[score] * habit[score] / everybody[score] for score in SCORES}
    return {score: chance / sum(moved.values()) for score, chance in moved.items()}


if __name__ == "__main__":
    script(main)
