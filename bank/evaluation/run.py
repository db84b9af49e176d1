"""An evaluation: every method over every person, for every seed, unless it is already recorded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from adapters.training.adapt_config import AdaptConfig
from bank.evaluation.adapters import Adapters, Evidence
from bank.evaluation.methods import Base, EvalMethod
from bank.evaluation.people import Person, asked
from bank.evaluation.records import Record, Records
from bank.evaluation.scoring import Scores
from bank.evaluation.speakers import OpenBank, PersonAdapter
from bank.items.prompt import ChatTokenizer
from bank.items.tasks import AnswerKind, Task

NEW_TOKENS = {"labels": 8, "score": 3, "text": 32}


@dataclass(frozen=True, slots=True)
class EvalOptions:
    """How an evaluation is done.

    Attributes:
        methods: in the order in which they run.
        seeds: one run each; only what is random or trained differs between them.
        writing: those of the methods that also write texts at length, to see whose voice they have; for tasks with free
            answers; under the adapters of the first seed.
        texts: how many of them for each query.
        predict: whether answers are generated, for the task's metrics.
        sample: how many people, from the first, get what is costly: few-shot training, points of curves and generated
            texts; all when None.
        max_tokens: longest example, its answer included; a longer one loses the end of the user's turn. Each past item
            in the prompt may bring as much again.
    """

    methods: tuple[EvalMethod, ...]
    seeds: tuple[int, ...]
    predict: bool
    sample: int | None = None
    writing: tuple[EvalMethod, ...] = ()
    texts: int = 3
    max_tokens: int = 512

    def methods_of(self, place: int) -> tuple[EvalMethod, ...]:
        """The methods for the person at this place."""
        return tuple(m for m in self.methods if self._sampled(place) or not (m.trained or m.varied))

    def predicts(self, place: int, method: EvalMethod, kind: AnswerKind) -> bool:
        """Whether this method answers for the person at this place, in a task of this kind."""
        return self.predict and not method.varied and (self._sampled(place) or kind != "text")

    def writes(self, place: int, method: EvalMethod, kind: AnswerKind) -> bool:
        """Whether this method writes texts for the person at this place."""
        return method in self.writing and kind == "text" and self._sampled(place)

    def pieces(self, people: int) -> int:
        """How many (person, method, seed) there are."""
        return len(self.seeds) * sum(len(self.methods_of(place)) for place in range(people))

    def _sampled(self, place: int) -> bool:
        return self.sample is None or place < self.sample


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a record is to have besides the loss."""

    prediction: bool
    texts: int


class Evaluation:
    """Runs methods over people.

    Args:
        adapters: makes the adapters.
        scores: what reads the queries: the model in process or an engine.
        tokenizer: the base model's.
        task: the bank's.
        records: those there are, and where new ones go.
        options: how to evaluate.
        key: the records'.
    """

    def __init__(
        self,
        adapters: Adapters,
        scores: Scores,
        tokenizer: ChatTokenizer,
        task: Task,
        records: Records,
        *,
        options: EvalOptions,
        key: str,
    ) -> None:
        self._adapters = adapters
        self._scores = scores
        self._tokenizer = tokenizer
        self._task = task
        self._records = records
        self._options = options
        self._key = key

    def run(self, people: Sequence[Person], on_done: Callable[[int], None]) -> None:
        """Evaluate all people; `on_done` is told how many more (person, method, seed) are done."""
        for place, person in enumerate(people):
            evidences: dict[int | None, Evidence] = {}
            for seed in self._options.seeds:
                self._person(place, person, seed, evidences, on_done)

    def _person(
        self,
        place: int,
        person: Person,
        seed: int,
        evidences: dict[int | None, Evidence],
        on_done: Callable[[int], None],
    ) -> None:
        """One person and seed; `evidences`, by how many items are known, are the person's for all seeds."""
        methods = self._options.methods_of(place)
        kind, options = self._task.kind, self._options
        texts = options.texts if seed == options.seeds[0] else 0
        wanted = {
            m: _Wanted(options.predicts(place, m, kind), texts if options.writes(place, m, kind) else 0)
            for m in methods
        }
        waiting = [m for m in methods if not self._has(person, m, seed, wanted[m])]
        on_done(len(methods) - len(waiting))
        if not waiting:
            return
        repeated = [m for m in waiting if self._repeats(m, seed)]
        for method in repeated:
            found = self._records.of(person.user_id, method.name, options.seeds[0])
            self._records.add(replace(record, seed=seed, written=()) for record in found)
            on_done(1)
        known = {m: m.items for m in waiting if m not in repeated}
        for items in set(known.values()) - evidences.keys():
            evidences[items] = self._adapters.evidence(person.knowing(items))
        made = {m: self._adapters.make(m, evidences[items], seed) for m, items in known.items() if not m.trained}
        for method, items in known.items():
            evidence = evidences[items]
            adapter = made[method] if method in made else self._adapters.make(method, evidence, seed)
            self._records.add(self._evaluated(adapter, evidence, method, seed, wanted[method]))
            on_done(1)

    def _evaluated(
        self, adapter: PersonAdapter | None, evidence: Evidence, method: EvalMethod, seed: int, wanted: _Wanted
    ) -> list[Record]:
        person = evidence.person
        examples = asked(self._tokenizer, self._task, person, method.history, self._options.max_tokens)
        if method.base is Base.PRIOR:
            readings = self._adapters.habits(person, examples)
        else:
            readings = self._scores.read(adapter, examples, NEW_TOKENS[self._task.kind] if wanted.prediction else 0)
        texts = wanted.texts
        written = self._scores.write(adapter, examples, texts) if texts else [[] for _ in examples]
        timed = method.base is not Base.PRIOR and not method.varied
        first_ms = self._scores.first_token_ms(adapter, examples[0]) if timed else None
        kept_bytes = self._adapters.kept_bytes(method, evidence, adapter)
        judgement = evidence.trained.get((method.plain, seed))
        rejected = judgement is not None and judgement.weights is None
        return [
            Record(
                self._key,
                person.user_id,
                query.id,
                method.name,
                seed,
                found.loss,
                found.answer,
                query.gold,
                rejected,
                0 if method.base is Base.PRIOR else example.loss_from,
                None if place else first_ms,
                written[place],
                kept_bytes,
            )
            for place, (query, found, example) in enumerate(zip(person.queries, readings, examples, strict=True))
        ]

    def _repeats(self, method: EvalMethod, seed: int) -> bool:
        """Whether a method does what it did for the first seed: nothing in it is random."""
        return seed != self._options.seeds[0] and not method.trained and method.base is not Base.RANDOM

    def _has(self, person: Person, method: EvalMethod, seed: int, wanted: _Wanted) -> bool:
        return self._records.has(
            person.user_id,
            method.name,
            seed,
            len(person.queries),
            predicted=wanted.prediction,
            texts=wanted.texts,
        )


def evaluation_key(
    bank: OpenBank,
    task_bank: OpenBank | None,
    plan: AdaptConfig,
    people: Sequence[Person],
    how: str,
    *,
    strength: float,
) -> str:
    """SHA-256 (16 hex digits) of all that decides what a record is, seed and method aside."""
    content: dict[str, Any] = {
        "bank": bank.manifest.fingerprint,
        "task": task_bank.manifest.fingerprint if task_bank else None,
        "plan": asdict(replace(plan, seed=0)) | {"strength": strength},
        "people": [
            [p.user_id, [dict(i.fields) for i in p.history.items], [asdict(q) for q in p.queries]] for p in people
        ],
        "how": how,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
