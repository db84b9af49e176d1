"""Evaluate one user with all methods, and store a record per query, so that an interrupted run can continue."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path

from adapters.errors import excerpt
from bank.errors import BankError
from bank.items.histories import History
from evaluation.methods import Evaluator, Evidence, Method
from evaluation.scoring import EvalAdapter

RECORDS_FILE = "records.jsonl"
NEW_TOKENS = {"labels": 8, "score": 3, "text": 32}  # longest prediction, by kind of answer


@dataclass(frozen=True, slots=True)
class MethodRun:
    """One method with one seed for one user, and the results requested besides losses."""

    method: Method
    seed: int = 0
    predicted: bool = False
    texts: int = 0  # number of sampled answers per query
    timed: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """The results of one run for one query."""

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
    key: str = ""  # the key of `Records`


class Records:
    """The records with one key, a hash of bank, settings and data, in a folder, which is created if needed."""

    def __init__(self, folder: Path, key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RECORDS_FILE
        self._key = key
        self._found: dict[tuple[str, str, int, str], Record] = {}
        self._remember([record for record in read_records(self._path) if record.key == key])

    def has_results(self, user: History, run: MethodRun) -> bool:
        """Whether every query of a user has a record with all requested results."""
        for query in user.queries:
            found = self._found.get((user.user_id, run.method.name, run.seed, query.id))
            if found is None or len(found.written) < run.texts or (run.predicted and found.prediction is None):
                return False
        return True

    def add(self, records: Sequence[Record]) -> None:
        """Append the records of one user and run, which replace earlier ones."""
        stamped = [replace(record, key=self._key) for record in records]
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in stamped))
        self._remember(stamped)

    def all(self) -> list[Record]:
        return list(self._found.values())

    def _remember(self, records: Sequence[Record]) -> None:
        self._found |= {(r.user_id, r.method, r.seed, r.query_id): r for r in records}


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file, if it exists; remove an incomplete last line, which a killed run may leave."""
    whole, _, torn = path.read_bytes().rpartition(b"\n") if path.exists() else (b"", b"", b"")
    if torn:
        os.truncate(path, len(whole) + bool(whole))
    for number, line in enumerate(filter(None, whole.decode("utf-8").split("\n")), 1):
        try:
            yield Record(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise BankError(f"{path}, line {number} is not a record: {excerpt(line)}") from error


def evaluate_user(evaluator: Evaluator, user: History, runs: Sequence[MethodRun]) -> Iterator[list[Record]]:
    """Yield each run's records, one per query; runs must be grouped by seed."""
    counts = {run.method.items for run in runs}  # of the last items; None: all
    evidence = {n: evaluator.evidence(replace(user, items=user.items[-n:] if n else user.items)) for n in counts}
    for seed, group in groupby(runs, lambda run: run.seed):
        # Make all adapters of a seed before any reading: attaching costs more than a few passes, and signing and
        # training need the bare model. Make them per seed, because a killed run loses adapters without records.
        prepared = []
        for run in group:
            known = evidence[run.method.items]
            prepared.append((run, known, evaluator.adapter(run.method, known, seed)))
        for run, known, adapter in prepared:
            yield _records(evaluator, run, known, adapter)


def _records(evaluator: Evaluator, run: MethodRun, evidence: Evidence, adapter: EvalAdapter | None) -> list[Record]:
    method, scorer = run.method, evaluator.scorer
    new_tokens = NEW_TOKENS[evaluator.bank.serving.task.kind] if run.predicted else 0
    examples, readings = evaluator.read(method, evidence, adapter, new_tokens)
    phrases = evaluator.phrases(method, evidence)
    written = scorer.write(adapter, examples, run.texts, phrases) if run.texts else [[] for _ in examples]
    rejected = method.trained and bool(evidence.signature_examples) and not (adapter and adapter.trained)
    kept_bytes = evaluator.kept_bytes(method, evidence, adapter)
    records = [
        Record(
            user_id=evidence.user.user_id,
            query_id=query.id,
            method=method.name,
            seed=run.seed,
            loss=reading.loss,
            prediction=reading.answer,
            gold=query.gold,
            rejected=rejected,
            prompt_tokens=0 if method.adapter == "prior" else example.loss_from,
            written=texts,
            kept_bytes=kept_bytes,
            chances=reading.chances,
        )
        for query, example, reading, texts in zip(evidence.user.queries, examples, readings, written, strict=True)
    ]
    if run.timed:
        records[0] = replace(records[0], first_token_ms=scorer.first_token_ms(adapter, examples[0]))
    return records
