"""From files to tables: opens what an evaluation needs, checks that it fits together, runs it, writes the results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from adapters.training.adapt_config import AdaptConfig
from bank.errors import BankError
from bank.evaluation.authorship import AuthorshipRow, authorship
from bank.evaluation.authorship import markdown as authorship_table
from bank.evaluation.methods import Evaluator, curves
from bank.evaluation.pictures import draw
from bank.evaluation.run import EvalOptions, Record, Records, evaluate_user
from bank.evaluation.scoring import ModelReader, OpenBank, Scorer
from bank.evaluation.summary import LAMP_FOLDER, MethodRow, markdown, summarise, tables, write_lamp_files
from bank.items.histories import History, Query, read_excluded, read_histories
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


def evaluate(
    inputs: EvalInputs,
    options: EvalOptions,
    config: AdaptConfig,
    progress: Callable[[int, int], None],
    engine: ModelReader | None = None,
) -> tuple[dict[str, list[MethodRow]], list[AuthorshipRow]]:
    """Run what is not recorded yet, write the results; `progress` is told how many runs are done, of how many.

    Returns the rows of methods by the title of their table, and whose voice the texts have, where some were written.
    """
    bank = OpenBank.open(inputs.bank, inputs.embedder.id)
    task = bank.serving.task
    check_base_model(inputs.model_folder, {inputs.bank: bank.manifest})
    with_task = any(method.adapter == "task" for method in options.methods)
    people = _people(inputs, task)
    if inputs.curves:
        points = curves(len(bank.manifest.anchors), max(len(user.items) for user in people))
        options = replace(options, methods=tuple(dict.fromkeys((*options.methods, *points))))
    dtype = resolve_dtype(inputs.dtype)
    how = f"{'in an engine' if engine else 'in process'}, {dtype}"
    records = Records(inputs.out, _key(bank.manifest.fingerprint, people, config, how))
    evaluator = Evaluator(
        bank=bank,
        task_bank=bank.of_task(inputs.embedder.id) if with_task else None,
        scorer=Scorer(*load_base(inputs.model_folder, dtype)),
        embedder=inputs.embedder,
        engine=engine,
        config=config,
    )
    wanted = [list(options.runs(place, task.kind)) for place in range(len(people))]
    done, total = 0, sum(map(len, wanted))
    for user, runs in zip(people, wanted, strict=True):
        waiting = [run for run in runs if not records.have(user, run)]
        done += len(runs) - len(waiting)
        progress(done, total)
        for made in evaluate_user(evaluator, user, waiting, records.key):
            records.add(made)
            done += 1
            progress(done, total)
    names = {method.name for method in options.methods}
    made = [record for record in records.all() if record.method in names and record.seed < options.seeds]
    return _write(inputs.out, made, bank, people, options)


def _key(bank: str, people: Sequence[History], config: AdaptConfig, how: str) -> str:
    """SHA-256 (16 hex digits) of all that decides what a record is, seed and method aside.

    The task's row has no part in it: the bank that it was trained from decides it.
    """
    said = [[p.user_id, [dict(i.fields) for i in p.items], [asdict(q) for q in p.queries]] for p in people]
    content = {"bank": bank, "config": asdict(replace(config, seed=0)), "people": said, "how": how}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _people(inputs: EvalInputs, task: Task) -> list[History]:
    if inputs.last:
        histories = read_histories(inputs.users, task)
        people = split_histories(histories, task, queries=inputs.last, profile=inputs.profile)
    else:
        people = read_histories(inputs.users, task, queries=True)
    kept = read_excluded(inputs.only) if inputs.only else None
    people = [person for person in people if kept is None or person.user_id in kept][: inputs.people]
    if not people:
        raise BankError(
            f"nobody in {inputs.users} can be evaluated: with --last N, a history needs N and --profile items"
        )
    return people


def _write(
    out: Path, records: Sequence[Record], bank: OpenBank, people: Sequence[History], options: EvalOptions
) -> tuple[dict[str, list[MethodRow]], list[AuthorshipRow]]:
    task = bank.serving.task
    rows = summarise(records, task)
    found = tables(rows, records, task)
    draw(records, list(found.values())[-1], out)
    write_lamp_files(records, task, out / LAMP_FOLDER)
    written = {record.user_id for record in records if record.written}
    heard = [person for person in people if person.user_id in written and person.pairs(task)]
    voices = authorship(heard, records, task) if options.writing and len(heard) > 1 else []
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
    return found, voices


def split_histories(histories: list[History], task: Task, *, queries: int, profile: int) -> list[History]:
    """Users from whole histories: the last items become queries, the ones before them the profile.

    Whoever has too few items, or one that is no (input, output) pair, is left out.
    """
    people = []
    for history in histories:
        pairs = history.pairs(task)
        if len(pairs) == len(history.items) >= queries + profile:
            later = enumerate(pairs[-queries:])
            asked = tuple(Query(f"{history.user_id}-{place}", *pair) for place, pair in later)
            people.append(History(history.user_id, history.items[-queries - profile : -queries], asked))
    return people
