"""From files to a table: opens what an evaluation needs, checks that it fits together, runs it, writes the results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from adapters.training.adapt_config import AdaptConfig
from bank.errors import BankError
from bank.evaluation.adapters import Adapters
from bank.evaluation.methods import Base, curves
from bank.evaluation.people import Person, read_people, split_histories
from bank.evaluation.records import Record, Records
from bank.evaluation.report.authorship import AuthorshipRow, authorship
from bank.evaluation.report.authorship import markdown as authorship_table
from bank.evaluation.report.lamp_files import LAMP_FOLDER, write_lamp_files
from bank.evaluation.report.pictures import (
    CURVES_FILE,
    GAINS_FILE,
    MAP_FILE,
    PRICES_FILE,
    draw_curves,
    draw_gains,
    draw_map,
    draw_prices,
)
from bank.evaluation.report.summary import MethodRow, as_json, markdown, summarise, tables
from bank.evaluation.run import EvalOptions, Evaluation, evaluation_key
from bank.evaluation.scoring import Scorer, Scores
from bank.evaluation.speakers import OpenBank
from bank.items.histories import read_excluded, read_histories
from bank.items.tasks import Task
from bank.lookup.embedder import Embedder
from bank.lookup.weights import topic_weights
from bank.models.folders import check_base_model
from bank.models.load import load_base, resolve_dtype

TABLE_FILE, SUMMARY_FILE = "table.md", "summary.json"


@dataclass(frozen=True, slots=True)
class EvalInputs:
    """What is evaluated, and where it goes.

    Attributes:
        users: people in the LaMP per-user layout.
        bank: the bank's folder.
        out: folder of records and results.
        model_folder: the base model.
        embedder: the bank's.
        task: must be the bank's; None takes the bank's.
        people: how many of the first are evaluated; all when None.
        only: file of the ids that are evaluated; all when None.
        last: for files without queries, how many of each person's last items become queries.
        profile: with `last`, items before them that are the profile.
        dtype: of the base model.
        curves: whether `merged` is evaluated with other k and with fewer items too, for the picture.
    """

    users: Path
    bank: Path
    out: Path
    model_folder: Path
    embedder: Embedder
    task: str | None = None
    people: int | None = None
    only: Path | None = None
    last: int = 0
    profile: int = 10
    dtype: str = "auto"
    curves: bool = False


@dataclass(frozen=True, slots=True)
class Results:
    """What an evaluation found.

    Attributes:
        tables: rows of methods, by the title of their table.
        voices: whose voice the methods' texts have; empty where none were written.
    """

    tables: dict[str, list[MethodRow]]
    voices: list[AuthorshipRow]


def evaluate(
    inputs: EvalInputs,
    options: EvalOptions,
    plan: AdaptConfig,
    begin: Callable[[int], Callable[[int], None]],
    engine: Scores | None = None,
    *,
    strength: float,
) -> Results:
    """Run what is not recorded yet, and write table and summary.

    Args:
        inputs: what is evaluated.
        options: how.
        plan: of few-shot training.
        begin: called with how many pieces there are; returns what is called with how many more are done.
        engine: reads the queries instead of the model in process, which then only signs and trains.
        strength: of the anchors beneath a stacked adapter, as a share of theirs when merged.

    Returns:
        What table and summary say.

    Raises:
        BankError: when bank, people, model and methods do not fit together.
    """
    bank = OpenBank.open(inputs.bank, inputs.embedder.id)
    task = bank.serving.task
    if inputs.task not in (None, task.name):
        raise BankError(f"the bank at {inputs.bank} is for {task.name}, not for {inputs.task}")
    check_base_model(inputs.model_folder, {inputs.bank: bank.manifest})
    further = any(method.base is Base.TASK for method in options.methods)
    task_bank = bank.of_task(inputs.embedder.id) if further else None
    people = _people(inputs, task)
    if inputs.curves:
        longest = max(len(person.history.items) for person in people)
        points = curves(len(bank.manifest.anchors), longest)
        options = replace(options, methods=tuple(dict.fromkeys((*options.methods, *points))))
    dtype = resolve_dtype(inputs.dtype)
    where = "in an engine" if engine else "in process"
    key = evaluation_key(bank, task_bank, plan, people, f"{where}, {dtype}", strength=strength)
    records = Records(inputs.out, key)
    on_done = begin(options.pieces(len(people)))
    scorer = Scorer(*load_base(inputs.model_folder, dtype))

    adapters = Adapters(
        bank, task_bank, scorer, inputs.embedder, plan=plan, strength=strength, max_tokens=options.max_tokens
    )
    scores, tokenizer = engine or scorer, scorer.tokenizer
    try:
        Evaluation(adapters, scores, tokenizer, task, records, options=options, key=key).run(people, on_done)
    finally:
        scorer.bare()
    names = {method.name for method in options.methods}
    made = [record for record in records.all() if record.method in names and record.seed in options.seeds]
    rows = summarise(made, task)
    _draw(inputs, bank, adapters, people, made)
    write_lamp_files(made, task, inputs.out / LAMP_FOLDER)
    found = tables(rows, made, task)
    draw_prices(list(found.values())[-1], inputs.out / PRICES_FILE)
    voices = _voices(people, made, task) if options.writing else []
    (inputs.out / TABLE_FILE).write_text(
        markdown(found) + ("\n" + authorship_table(voices) if voices else ""), encoding="utf-8"
    )
    content = {
        "bank": bank.manifest.fingerprint,
        "people": len(people),
        "seeds": len(options.seeds),
        "methods": as_json(rows),
        "authorship": [asdict(row) for row in voices],
    }
    (inputs.out / SUMMARY_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return Results(found, voices)


def _voices(people: list[Person], records: list[Record], task: Task) -> list[AuthorshipRow]:
    """How texts are attributed, over the people for whom some were written."""
    written = {record.user_id for record in records if record.written}
    heard = [person for person in people if person.user_id in written and person.history.pairs(task)]
    return authorship(heard, records, task) if len(heard) > 1 else []


def _draw(inputs: EvalInputs, bank: OpenBank, adapters: Adapters, people: list[Person], records: list[Record]) -> None:
    """Draw the pictures that the evaluated methods allow."""
    methods = {record.method for record in records}
    against = next((name for name in (Base.TASK.value, Base.BASE.value) if name in methods), None)
    shown = [name for name in ("merged", "stacked", "own") if name in methods]
    if against and shown:
        draw_gains(records, inputs.out / GAINS_FILE, against=against, methods=shown)
    draw_curves(records, inputs.out / CURVES_FILE)
    anchors = bank.serving.index.vectors(range(len(bank.manifest.anchors)))
    embeddings = np.stack([adapters.evidence(person).embedding for person in people])
    nearest = [[w.anchor for w in topic_weights(bank.serving.index, bank.manifest.weights, e)] for e in embeddings]
    draw_map(anchors, embeddings, nearest, inputs.out / MAP_FILE)


def _people(inputs: EvalInputs, task: Task) -> list[Person]:
    if inputs.last:
        histories = read_histories(inputs.users, task)
        people = split_histories(histories, task, queries=inputs.last, profile=inputs.profile)
    else:
        people = read_people(inputs.users, task)
    kept = read_excluded(inputs.only) if inputs.only else None
    people = [person for person in people if kept is None or person.user_id in kept][: inputs.people]
    if not people:
        raise BankError(
            f"nobody in {inputs.users} can be evaluated: with --last N, a history needs N and --profile items"
        )
    return people
