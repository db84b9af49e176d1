"""People to evaluate on, each with a profile, and with queries later than all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.errors import excerpt
from adapters.training.example import Example
from bank.errors import BankError
from bank.items.histories import History, identity_of, read_histories
from bank.items.lessons import encode_recalling
from bank.items.prompt import ChatTokenizer
from bank.items.retrieval import ItemIndex
from bank.items.tasks import Task


@dataclass(frozen=True, slots=True)
class Query:
    """One question to be answered as the person would: `gold` is their own answer."""

    id: str
    input: str
    gold: str


@dataclass(frozen=True, slots=True)
class Person:
    """One person.

    Attributes:
        history: their profile.
        queries: at least one.
    """

    history: History
    queries: tuple[Query, ...]

    @property
    def user_id(self) -> str:
        """As in the file."""
        return self.history.user_id

    def knowing(self, items: int | None) -> Person:
        """The same person with only their last `items` items known; all of them when None."""
        return (
            self if items is None else replace(self, history=replace(self.history, items=self.history.items[-items:]))
        )


def read_people(path: Path, task: Task) -> list[Person]:
    """Read people with their queries, in the LaMP per-user layout.

    Raises:
        BankError: naming the person without queries, or with a malformed one.
    """
    histories = {history.user_id: history for history in read_histories(path, task)}
    people = []
    for raw in json.loads(path.read_text("utf-8")):
        user_id = str(identity_of(raw))
        queries = tuple(_query(path, user_id, place, entry) for place, entry in enumerate(raw.get("query") or ()))
        if not queries:
            raise BankError(
                f"{path}: person {excerpt(user_id)} has no queries to evaluate on: give `query`, or make queries of "
                "the last items with `mta eval --last N`"
            )
        people.append(Person(histories[user_id], queries))
    return people


def split_histories(histories: list[History], task: Task, *, queries: int, profile: int) -> list[Person]:
    """People from whole histories: their last items become queries, the ones before them the profile.

    Args:
        histories: in time order.
        task: whose items they are.
        queries: items that become queries.
        profile: items before them that are the profile.

    Returns:
        Those whose history is long enough.
    """
    people = []
    for history in histories:
        pairs = history.pairs(task)
        if len(pairs) != len(history.items) or len(pairs) < queries + profile:
            continue
        kept = History(history.user_id, history.items[-queries - profile : -queries])
        asked = tuple(
            Query(f"{history.user_id}-{place}", turn, gold) for place, (turn, gold) in enumerate(pairs[-queries:])
        )
        people.append(Person(kept, asked))
    return people


def asked(tokenizer: ChatTokenizer, task: Task, person: Person, history: int, max_tokens: int) -> list[Example]:
    """What a person is asked, with their most relevant past items in the prompt, and their answers.

    Args:
        tokenizer: the base model's.
        task: the bank's.
        person: with queries.
        history: how many past items; each may make the prompt longer by `max_tokens`.
        max_tokens: longest example without past items.
    """
    index = ItemIndex(task, person.history.items if history else ())
    return [
        encode_recalling(
            tokenizer,
            task,
            query.input,
            query.gold,
            memories=index.memories(query.input, history),
            max_tokens=max_tokens * (1 + history),
        )
        for query in person.queries
    ]


def _query(path: Path, user_id: str, place: int, raw: Any) -> Query:
    fields = ("id", "input", "gold")
    if not isinstance(raw, Mapping) or any(not isinstance(raw.get(name), str | int) for name in fields):
        raise BankError(
            f"{path}: query {place} of person {excerpt(user_id)} must be {{id, input, gold}}, got {excerpt(raw)}"
        )
    return Query(*(str(raw[name]) for name in fields))
