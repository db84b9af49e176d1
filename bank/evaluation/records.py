"""Records of an evaluation, one line per query: appended as they are made, so that a killed run can continue."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from adapters.errors import excerpt
from bank.errors import BankError

RECORDS_FILE = "records.jsonl"


@dataclass(frozen=True, slots=True)
class Record:
    """What one method made of one query.

    Attributes:
        key: hash of bank, settings and data: records with another key are not used.
        user_id, query_id, method, seed: what it is a record of.
        loss: mean loss per gold token, nats.
        prediction: the greedy answer; None when none was asked for.
        gold: the person's own answer.
        rejected: whether few-shot training was rejected, so that the method fell back to what lies beneath.
        prompt_tokens: what the model reads before it answers.
        first_token_ms: how long it takes over that, of the person's first query; None where it was not measured.
        written: texts sampled as answers, for authorship; none where none were asked for.
        kept_bytes: what a server keeps of the person for this method.
    """

    key: str
    user_id: str
    query_id: str
    method: str
    seed: int
    loss: float
    prediction: str | None
    gold: str
    rejected: bool = False
    prompt_tokens: int = 0
    first_token_ms: float | None = None
    written: Sequence[str] = ()
    kept_bytes: int = 0


class Records:
    """The records of one folder.

    Args:
        folder: where they are; made if needed.
        key: this evaluation's.
    """

    def __init__(self, folder: Path, key: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / RECORDS_FILE
        self._key = key
        self._found: dict[tuple[str, str, int], dict[str, Record]] = defaultdict(dict)
        self._remember(self._read())

    def has(self, user_id: str, method: str, seed: int, queries: int, *, predicted: bool, texts: int = 0) -> bool:
        """Whether all queries of a person are recorded, with predictions and so many texts where they are wanted."""
        found = self.of(user_id, method, seed)
        lacking = any((predicted and record.prediction is None) or len(record.written) < texts for record in found)
        return len(found) == queries and not lacking

    def of(self, user_id: str, method: str, seed: int) -> list[Record]:
        """The records of one person and method."""
        return list(self._found.get((user_id, method, seed), {}).values())

    def add(self, records: Iterable[Record]) -> None:
        """Append the records of one person and method, whole or not at all; they replace earlier ones."""
        records = list(records)
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records))
        self._remember(records)

    def all(self) -> list[Record]:
        """Every record of this evaluation."""
        return [record for found in self._found.values() for record in found.values()]

    def _remember(self, records: Iterable[Record]) -> None:
        for record in records:
            self._found[record.user_id, record.method, record.seed][record.query_id] = record

    def _read(self) -> Iterator[Record]:
        if not self._path.exists():
            return
        whole, _, torn = self._path.read_bytes().rpartition(b"\n")
        if torn:  # the run was killed while it wrote this line
            self._path.write_bytes(whole + b"\n" if whole else b"")
        for number, line in enumerate(filter(None, whole.decode("utf-8").split("\n")), 1):
            try:
                record = Record(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise BankError(f"{self._path}, line {number} is not a record: {excerpt(line)}") from error
            if record.key == self._key:
                yield record
