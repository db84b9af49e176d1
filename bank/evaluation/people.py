"""Users to evaluate on, each with a profile, and with queries later than all of it."""

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
    """One question to be answered as the user would: `gold` is their own answer."""

    id: str
    input: str
    gold: str


@dataclass(frozen=True, slots=True)
class EvalUser:
    """A user whose `history` is the profile, with at least one query."""

    history: History
    queries: tuple[Query, ...]

    @property
    def user_id(self) -> str:
        return self.history.user_id

    def knowing(self, items: int | None) -> EvalUser:
        """The same user with only their last `items` items known; all of them when None."""
        if items is None:
            return self
        return replace(self, history=replace(self.history, items=self.history.items[-items:]))


def read_people(path: Path, task: Task) -> list[EvalUser]:
    """Read users with their queries, in the LaMP per-user layout."""
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
        people.append(EvalUser(histories[user_id], queries))
    return people


def split_histories(histories: list[History], task: Task, *, queries: int, profile: int) -> list[EvalUser]:
    """Users from whole histories: the last items become queries, the ones before them the profile.

    Whoever has too few items, or one that is no (input, output) pair, is left out.
    """
    people = []
    for history in histories:
        pairs = history.pairs(task)
        if len(pairs) != len(history.items) or len(pairs) < queries + profile:
            continue
        known = History(history.user_id, history.items[-queries - profile : -queries])
        later = enumerate(pairs[-queries:])
        people.append(EvalUser(known, tuple(Query(f"{history.user_id}-{place}", *pair) for place, pair in later)))
    return people


def encode_queries(
    tokenizer: ChatTokenizer, task: Task, user: EvalUser, history: int, max_tokens: int
) -> list[Example]:
    """A user's queries and answers, with their `history` most relevant past items in the prompt.

    Each past item may make the prompt longer by `max_tokens`, the longest example without any.
    """
    index = ItemIndex(task, user.history.items if history else ())
    longest = max_tokens * (1 + history)
    return [
        encode_recalling(
            tokenizer, task, query.input, query.gold, memories=index.memories(query.input, history), max_tokens=longest
        )
        for query in user.queries
    ]


def _query(path: Path, user_id: str, place: int, raw: Any) -> Query:
    fields = ("id", "input", "gold")
    if not isinstance(raw, Mapping) or any(not isinstance(raw.get(name), str | int) for name in fields):
        raise BankError(
            f"{path}: query {place} of person {excerpt(user_id)} must be {{id, input, gold}}, got {excerpt(raw)}"
        )
    return Query(*(str(raw[name]) for name in fields))
