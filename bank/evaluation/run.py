"""The loop of an evaluation over one user, and its records, one line a query, so that a killed run can go on."""

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
    key: str  # hash of bank, settings and data: records with another key are not used
    user_id: str
    query_id: str
    method: str
    seed: int
    loss: float  # nats per gold token
    prediction: str | None  # the greedy answer; None when none was asked for
    gold: str
    rejected: bool = False  # whether few-shot training was, so that the method fell back to what lies beneath
    prompt_tokens: int = 0
    first_token_ms: float | None = None  # of the user's first query; None where it was not measured
    written: Sequence[str] = ()  # texts sampled as answers, for authorship
    kept_bytes: int = 0  # what a server keeps of the user for this method
    chances: Sequence[float] = ()  # how likely each score is, in tasks of scores; none where the reader cannot say


@dataclass(frozen=True, slots=True)
class MethodRun:
    """One method with one seed over one user, with what is wanted besides losses."""

    method: Method
    seed: int = 0
    predicted: bool = False
    texts: int = 0
    timed: bool = False


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """What is compared, and how.

    What is costly, few-shot training, points of curves and generated texts, is for the first `sample` users; None is
    all. In tasks with free answers the methods of `writing` write `texts` texts for each query, to see whose voice they
    have.
    """

    methods: tuple[Method, ...]
    seeds: int = 1  # how many; only what is random or trained is done for each
    predict: bool = True  # whether answers are generated, for the task's metrics
    sample: int | None = None
    writing: tuple[Method, ...] = ()
    texts: int = 3

    def runs(self, place: int, kind: AnswerKind) -> Iterator[MethodRun]:
        """What is done for the user at this place, in a task with such answers."""
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
    """The records of one folder, which is made if needed, of the evaluation with this key."""

    def __init__(self, folder: Path, key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.key = key
        self._path = folder / RECORDS_FILE
        self._found: dict[tuple[str, str, int, str], Record] = {}
        self._remember(record for record in read_records(self._path) if record.key == key)

    def have(self, user: History, run: MethodRun) -> bool:
        """Whether all queries of a user are recorded, with all that is wanted."""
        found = [self._found.get((user.user_id, run.method.name, run.seed, query.id)) for query in user.queries]
        return all(
            record and len(record.written) >= run.texts and not (run.predicted and record.prediction is None)
            for record in found
        )

    def add(self, records: Sequence[Record]) -> None:
        """Append the records of one user and run; they replace earlier ones."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))
        self._remember(records)

    def all(self) -> list[Record]:
        return list(self._found.values())

    def _remember(self, records: Iterable[Record]) -> None:
        self._found |= {(r.user_id, r.method, r.seed, r.query_id): r for r in records}


def read_records(path: Path) -> Iterator[Record]:
    """The records of a file, if it is there; a line that a killed run has torn is cut off it."""
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
    """The records of each run in turn, one for each query; runs with one seed stand together."""
    known = {
        n: evaluator.evidence(replace(user, items=user.items[-(n or 0) :])) for n in {r.method.items for r in runs}
    }
    for _, group in groupby(runs, lambda run: run.seed):
        # All adapters before any reading: attaching one costs more than a few passes, and signing and training need
        # the bare model. Not those of all seeds: what is trained and not recorded is lost with a killed run.
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
