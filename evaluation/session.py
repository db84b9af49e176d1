"""Run an evaluation from files to tables: open and check the inputs, evaluate the users, write the results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

from adapters.errors import excerpt
from adapters.training.adapt_config import AdaptConfig
from bank.errors import BankError
from bank.items.histories import History, read_excluded, read_histories
from bank.items.tasks import AnswerKind, Task
from bank.lookup.embedder import Embedder
from bank.lookup.prior import allowed_answers
from bank.models.folders import check_base_model
from bank.models.load import load_base, resolve_dtype
from evaluation.authorship import AuthorshipRow, authorship, authorship_table
from evaluation.methods import Evaluator, Method, curves
from evaluation.pictures import draw
from evaluation.run import MethodRun, Record, Records, evaluate_user
from evaluation.scoring import OpenBank, Scorer
from evaluation.summary import LAMP_FOLDER, MethodRow, markdown, summarise, tables, write_lamp_files

TABLE_FILE, SUMMARY_FILE = "table.md", "summary.json"


@dataclass(frozen=True, slots=True)
class EvalInputs:
    """Inputs of an evaluation, and the folder `out` for records and results."""

    users: Path  # in the LaMP per-user layout
    bank: Path
    out: Path
    model_folder: Path
    embedder: Embedder
    people: int | None = None  # number of people, from the first; None for all
    only: Path | None = None  # file with the ids of the people to evaluate
    last: int = 0  # for files without queries: number of each person's last items to use as queries
    profile: int = 10  # with `last`: number of items before them to use as the profile
    dtype: str = "auto"
    curves: bool = False  # whether to also evaluate `merged` with other k and with fewer items


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """The methods of a comparison, and which results to measure."""

    methods: tuple[Method, ...]
    seeds: int = 1  # number of seeds for methods that are random or trained; others run once
    predict: bool = True  # whether to generate answers, for the task's metrics
    sample: int | None = None  # number of users, from the first, for training, curves and texts; None for all
    writing: tuple[Method, ...] = ()  # methods that sample texts for the authorship test, if answers are free text
    texts: int = 3  # number of texts per query

    def runs(self, position: int, kind: AnswerKind) -> Iterator[MethodRun]:
        """Yield the runs for the user at index `place`, in a task with answers of this kind."""
        sampled = self.sample is None or position < self.sample
        for seed in range(self.seeds):
            for method in self.methods:
                costly = method.trained or method.on_curve
                uses_seed = method.trained or method.adapter == "random"
                if (costly and not sampled) or (seed > 0 and not uses_seed):
                    continue
                predicted = self.predict and not method.on_curve and (sampled or kind != "text")
                writes = method in self.writing and sampled and kind == "text" and seed == 0
                timed = method.adapter != "prior" and not method.on_curve
                yield MethodRun(method, seed, predicted, self.texts if writes else 0, timed)


def evaluate(
    inputs: EvalInputs, options: EvalOptions, config: AdaptConfig, progress: Callable[[int, int], None]
) -> tuple[dict[str, list[MethodRow]], list[AuthorshipRow]]:
    """Do the runs without records, write the results, and return rows of methods by table title, and of authorship."""
    if all(method.on_curve for method in options.methods):
        raise BankError("--methods: tables leave out points of curves (@k, @n), so give another method too")
    bank = OpenBank.open(inputs.bank, inputs.embedder.id)
    task = bank.serving.task
    check_base_model(inputs.model_folder, {inputs.bank: bank.manifest})
    people = _people(inputs, task)
    if inputs.curves:
        anchors = 0 if bank.manifest.directions else len(bank.manifest.anchors)
        points = curves(anchors, max(len(user.items) for user in people))
        options = replace(options, methods=tuple(dict.fromkeys((*options.methods, *points))))
    dtype = resolve_dtype(inputs.dtype)
    records = Records(inputs.out, _key(bank.manifest.fingerprint, people, config, dtype))
    if any(method.adapter == "task" for method in options.methods):
        _ = bank.task_bank  # raises BankError now if there is none
    scorer = Scorer(*load_base(inputs.model_folder, dtype))
    evaluator = Evaluator(bank=bank, scorer=scorer, embedder=inputs.embedder, config=config)
    wanted = [list(options.runs(position, task.kind)) for position in range(len(people))]
    done, total = 0, sum(map(len, wanted))
    for user, runs in zip(people, wanted, strict=True):
        waiting = [run for run in runs if not records.has_results(user, run)]
        done += len(runs) - len(waiting)
        progress(done, total)
        for made in evaluate_user(evaluator, user, waiting):
            records.add(made)
            done += 1
            progress(done, total)
    names = {method.name for method in options.methods}
    shown = [record for record in records.all() if record.method in names and record.seed < options.seeds]
    return _write(inputs.out, shown, bank, people, options)


def _key(bank: str, people: Sequence[History], config: AdaptConfig, dtype: str) -> str:
    """Return the SHA-256 (16 hex digits) of all that determines a record except seed and method."""
    contents = [[p.user_id, [dict(i.fields) for i in p.items], [asdict(q) for q in p.queries]] for p in people]
    settings = {"config": asdict(replace(config, seed=0)), "how": f"in process, {dtype}"}
    content = settings | {"bank": bank, "people": contents}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _people(inputs: EvalInputs, task: Task) -> list[History]:
    """Read the people to evaluate; with `last`, skip those with too few items, or with an item that is not a pair."""
    people = read_histories(inputs.users, task, queries=not inputs.last)
    if inputs.last:
        needed = inputs.last + inputs.profile
        people = [
            person.with_queries(task, inputs.last, inputs.profile)
            for person in people
            if len(person.pairs(task)) == len(person.items) >= needed
        ]
    if inputs.only:
        kept = read_excluded(inputs.only)
        people = [person for person in people if person.user_id in kept]
    if not people:
        raise BankError(
            f"nobody in {inputs.users} can be evaluated: with --last N, a history needs at least N + --profile items"
        )
    people, allowed = people[: inputs.people], allowed_answers(task)
    for who in people:
        if unknown := [query.gold for query in who.queries if allowed and query.gold not in allowed]:
            raise BankError(
                f"{inputs.users}: person {excerpt(who.user_id)} answers {excerpt(unknown[0])}, but the answers of "
                f"{task.name} are {', '.join(allowed)}"
            )
    return people


def _write(
    out: Path, records: Sequence[Record], bank: OpenBank, people: Sequence[History], options: EvalOptions
) -> tuple[dict[str, list[MethodRow]], list[AuthorshipRow]]:
    task = bank.serving.task
    rows = summarise(records, task)
    summary = tables(rows, records, task)
    draw(records, list(summary.values())[-1], out)
    write_lamp_files(records, task, out / LAMP_FOLDER)
    written = {record.user_id for record in records if record.written}
    authors = [person for person in people if person.user_id in written and person.pairs(task)]
    authorship_rows = authorship(authors, records, task) if options.writing and len(authors) > 1 else []
    by_judge = [list(rows) for _, rows in groupby(authorship_rows, lambda row: row.judge)]
    text = "\n".join([markdown(summary), *map(authorship_table, by_judge)])
    (out / TABLE_FILE).write_text(text, encoding="utf-8")
    content = {
        "bank": bank.manifest.fingerprint,
        "people": len(people),
        "seeds": options.seeds,
        "methods": [asdict(row) for row in rows],
        "authorship": [asdict(row) for row in authorship_rows],
    }
    (out / SUMMARY_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return summary, authorship_rows
