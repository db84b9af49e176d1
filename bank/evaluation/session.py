"""From files to a table: opens what an evaluation needs, checks that it fits together, runs it, writes the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from adapters.training.adapt_config import AdaptConfig
from bank.errors import BankError
from bank.evaluation.methods import Evaluator, curves
from bank.evaluation.people import EvalUser, read_people, split_histories
from bank.evaluation.report.authorship import AuthorshipRow, authorship
from bank.evaluation.report.authorship import markdown as authorship_table
from bank.evaluation.report.lamp import LAMP_FOLDER, write_lamp_files
from bank.evaluation.report.pictures import draw
from bank.evaluation.report.summary import MethodRow, markdown, summarise, tables
from bank.evaluation.run import EvalOptions, Record, Records, evaluate_people, evaluation_key
from bank.evaluation.scoring import OpenBank, Scorer, Scores
from bank.items.histories import read_excluded, read_histories
from bank.items.tasks import Task
from bank.lookup.embedder import Embedder
from bank.models.folders import check_base_model
from bank.models.load import load_base, resolve_dtype

TABLE_FILE, SUMMARY_FILE = "table.md", "summary.json"


@dataclass(frozen=True, slots=True)
class EvalInputs:
    """What is evaluated, and the folder `out` of records and results."""

    users: Path  # in the LaMP per-user layout
    bank: Path
    out: Path
    model_folder: Path
    embedder: Embedder
    people: int | None = None  # how many of the first; all when None
    only: Path | None = None  # a file of the ids that are evaluated
    last: int = 0  # for files without queries: how many of each person's last items become queries
    profile: int = 10  # with `last`: how many items before them are the profile
    dtype: str = "auto"
    curves: bool = False  # whether `merged` is evaluated with other k and with fewer items too


@dataclass(frozen=True, slots=True)
class Results:
    """Rows of methods by the title of their table, and whose voice the methods' texts have, where some were written."""

    tables: dict[str, list[MethodRow]]
    voices: list[AuthorshipRow]


def evaluate(
    inputs: EvalInputs,
    options: EvalOptions,
    config: AdaptConfig,
    progress: Callable[[int, int], None],
    engine: Scores | None = None,
) -> Results:
    """Run what is not recorded yet, and write table and summary.

    Args:
        config, engine: as in `Evaluator`.
        progress: told how many runs are done, of how many.
    """
    bank = OpenBank.open(inputs.bank, inputs.embedder.id)
    task = bank.serving.task
    check_base_model(inputs.model_folder, {inputs.bank: bank.manifest})
    further = any(method.adapter == "task" for method in options.methods)
    task_bank = bank.of_task(inputs.embedder.id) if further else None
    people = _people(inputs, task)
    if inputs.curves:
        points = curves(len(bank.manifest.anchors), max(len(user.history.items) for user in people))
        options = replace(options, methods=tuple(dict.fromkeys((*options.methods, *points))))
    dtype = resolve_dtype(inputs.dtype)
    how = f"{'in an engine' if engine else 'in process'}, {dtype}"
    records = Records(inputs.out, evaluation_key(bank.manifest.fingerprint, people, config, how))
    scorer = Scorer(*load_base(inputs.model_folder, dtype))
    evaluator = Evaluator(
        bank=bank,
        scorer=scorer,
        embedder=inputs.embedder,
        max_tokens=options.max_tokens,
        task_bank=task_bank,
        engine=engine,
        config=config,
    )
    try:
        evaluate_people(evaluator, people, options, records, progress)
    finally:
        scorer.bare()
    names = {method.name for method in options.methods}
    made = [record for record in records.all() if record.method in names and record.seed < options.seeds]
    return _write(inputs.out, made, bank, people, options)


def _write(
    out: Path, records: Sequence[Record], bank: OpenBank, people: Sequence[EvalUser], options: EvalOptions
) -> Results:
    task = bank.serving.task
    rows = summarise(records, task)
    found = tables(rows, records, task)
    draw(records, list(found.values())[-1], out)
    write_lamp_files(records, task, out / LAMP_FOLDER)
    voices = _voices(people, records, task) if options.writing else []
    text = markdown(found) + ("\n" + authorship_table(voices) if voices else "")
    (out / TABLE_FILE).write_text(text, encoding="utf-8")
    content = {
        "bank": bank.manifest.fingerprint,
        "people": len(people),
        "seeds": options.seeds,
        "methods": [asdict(row) for row in rows],
        "authorship": [asdict(row) for row in voices],
    }
    (out / SUMMARY_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return Results(found, voices)


def _voices(people: Sequence[EvalUser], records: Sequence[Record], task: Task) -> list[AuthorshipRow]:
    """How texts are attributed, over the people for whom some were written."""
    written = {record.user_id for record in records if record.written}
    heard = [person for person in people if person.user_id in written and person.history.pairs(task)]
    return authorship(heard, records, task) if len(heard) > 1 else []


def _people(inputs: EvalInputs, task: Task) -> list[EvalUser]:
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
