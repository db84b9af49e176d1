"""Evaluate one user with all methods, and store a record per query, so that an interrupted run can continue."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

from adapters.errors import excerpt
from bank.errors import BankError
from bank.evaluation.methods import Evaluator, Evidence, Method
from bank.evaluation.scoring import EvalAdapter
from bank.items.histories import History
from bank.items.tasks import AnswerKind

RECORDS_FILE = "records.jsonl"
NEW_TOKENS = {"labels": 8, "score": 3, "text": 32}


@dataclass(frozen=True, slots=True)
class Record:
    key: str  # hash of bank, settings and data; records with another key are ignored
    user_id: str
    query_id: str
    method: str
    seed: int
    loss: float  # nats per gold token
    prediction: str | None  # greedy answer; None if not requested
    gold: str
    rejected: bool = False  # whether few-shot training was rejected, so that the method used the adapter without it
    prompt_tokens: int = 0
    first_token_ms: float | None = None  # for the user's first query; None if not measured
    written: Sequence[str] = ()  # sampled answers, for authorship
    kept_bytes: int = 0  # bytes a server stores for the user with this method
    chances: Sequence[float] = ()  # probability of each score; empty in other tasks or if the reader cannot tell


@dataclass(frozen=True, slots=True)
class MethodRun:
    """One method with one seed for one user, and which results besides losses are requested."""

    method: Method
    seed: int = 0
    predicted: bool = False
    texts: int = 0
    timed: bool = False


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """Options of a comparison of methods.

    Few-shot training, points of curves and generated texts are costly, so they are limited to the first `sample` users;
    None means all. In tasks with free-text answers, the methods in `writing` generate `texts` texts per query, for the
    authorship test.
    """

    methods: tuple[Method, ...]
    seeds: int = 1  # number of seeds for methods that are random or trained; others run once
    predict: bool = True  # whether to generate answers, for the task's metrics
    sample: int | None = None
    writing: tuple[Method, ...] = ()
    texts: int = 3

    def runs(self, place: int, kind: AnswerKind) -> Iterator[MethodRun]:
        """Yield the runs for the user at this index, in a task with answers of this kind."""
        sampled = self.sample is None or place < self.sample
        for seed in range(self.seeds):
            for method in self.methods:
                costly = method.trained or method.on_curve
                if (sampled or not costly) and (seed == 0 or method.random):
                    predicted = self.predict and not method.on_curve and (sampled or kind != "text")
                    writes = method in self.writing and sampled and kind == "text" and seed == 0
                    timed = method.adapter != "prior" and not method.on_curve
                    yield MethodRun(method, seed, predicted, self.texts if writes else 0, timed)


class Records:
    """The records with this key in one folder, which is created if needed."""

    def __init__(self, folder: Path, key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.key = key
        self._path = folder / RECORDS_FILE
        self._found: dict[tuple[str, str, int, str], Record] = {}
        self._remember(record for record in read_records(self._path) if record.key == key)

    def has_results(self, user: History, run: MethodRun) -> bool:
        """Whether all queries of a user are recorded, with all requested results."""
        found = [self._found.get((user.user_id, run.method.name, run.seed, query.id)) for query in user.queries]
        return all(
            record and len(record.written) >= run.texts and not (run.predicted and record.prediction is None)
            for record in found
        )

    def add(self, records: Sequence[Record]) -> None:
        """Append the records of one user and run, which replace earlier ones."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))
        self._remember(records)

    def all(self) -> list[Record]:
        return list(self._found.values())

    def _remember(self, records: Iterable[Record]) -> None:
        self._found |= {(r.user_id, r.method, r.seed, r.query_id): r for r in records}


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file, if it exists; remove an incomplete last line, which a killed run may leave."""
    whole, _, torn = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    if torn:
        path.write_bytes(whole + b"\n" if whole else b"")
    for number, line in enumerate(filter(None, whole.decode("utf-8").split("\n")), 1):
        try:
            yield Record(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise BankError(f"{path}, line {number} is not a record: {excerpt(line)}") from error


def evaluate_user(
    evaluator: Evaluator, user: History, runs: Sequence[MethodRun], key: str = ""
) -> Iterator[list[Record]]:
    """Yield each run's records, one per query; runs must be grouped by seed."""
    known = {
        n: evaluator.evidence(replace(user, items=user.items[-(n or 0) :])) for n in {r.method.items for r in runs}
    }
    for _, group in groupby(runs, lambda run: run.seed):
        # Make all adapters of a seed before any reading: attaching costs more than a few passes, and signing and
        # training need the bare model. Make them per seed, because a killed run loses adapters without records.
        made = [(run, evaluator.adapter(run.method, known[run.method.items], run.seed)) for run in group]
        for run, adapter in made:
            yield _records(evaluator, known[run.method.items], run, adapter, key)


def _records(
    evaluator: Evaluator, evidence: Evidence, run: MethodRun, adapter: EvalAdapter | None, key: str
) -> list[Record]:
    user, method, reader = evidence.user, run.method, evaluator.reader
    new_tokens = NEW_TOKENS[evaluator.bank.serving.task.kind] if run.predicted else 0
    examples, readings = evaluator.read(method, evidence, adapter, new_tokens)
    written = reader.write(adapter, examples, run.texts) if run.texts else [[] for _ in examples]
    first_ms = reader.first_token_ms(adapter, examples[0]) if run.timed else None
    rejected = method.trained and bool(evidence.training_examples) and not (adapter and adapter.trained)
    kept_bytes = evaluator.kept_bytes(method, evidence, adapter)
    return [
        Record(
            key=key,
            user_id=user.user_id,
            query_id=query.id,
            method=method.name,
            seed=run.seed,
            loss=reading.loss,
            prediction=reading.answer,
            gold=query.gold,
            rejected=rejected,
            prompt_tokens=0 if method.adapter == "prior" else example.loss_from,
            first_token_ms=None if place else first_ms,
            written=written[place],
            kept_bytes=kept_bytes,
            chances=reading.chances,
        )
        for place, (query, reading, example) in enumerate(zip(user.queries, readings, examples, strict=True))
    ]
