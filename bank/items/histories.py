"""Read people's histories from files: the LaMP per-user layout, or LaMP's own questions with their outputs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictInt,
    StrictStr,
    TypeAdapter,
    ValidationError,
)

from adapters.errors import excerpt
from bank.errors import BankError, ProfileError
from bank.items.folders import LeftOut, people_in, read_person
from bank.items.profile import Item, has_surrogate, item_pair, number_text, parse_item
from bank.items.tasks import Task


def _encodable(text: str) -> str:
    if has_surrogate(text):
        raise ValueError("a lone surrogate is not valid text")
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Answer = Annotated[Text, BeforeValidator(number_text)]


@dataclass(frozen=True, slots=True)
class Query:
    """One evaluation question; `gold` is the person's own answer."""

    __pydantic_config__ = ConfigDict(coerce_numbers_to_str=True)
    id: Text
    input: Text
    gold: Answer


@dataclass(frozen=True, slots=True)
class History:
    """One person's items in file order, and later queries for evaluation; the user id is never stored in a bank."""

    user_id: str
    items: tuple[Item, ...]
    queries: tuple[Query, ...] = ()

    def pairs(self, task: Task) -> list[tuple[str, str]]:
        """Return the (input, output) pairs to train on, which exclude plain-text items."""
        return [pair for item in self.items if (pair := item_pair(item, task)) is not None]

    def with_queries(self, task: Task, count: int, profile: int | None = None) -> History:
        """Return the person with the last `count` items, all pairs, as queries, and the `profile` items before them."""
        asked = [Query(f"{self.user_id}-{position}", *pair) for position, pair in enumerate(self.pairs(task)[-count:])]
        earlier = self.items[:-count]
        return History(self.user_id, earlier if profile is None else earlier[-profile:], tuple(asked))


class RawName(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)
    user_id: Text = Field(validation_alias=AliasChoices("user_id", "id"))


class RawPerson(RawName):
    id: str = ""  # question id in LaMP's own files
    input: Any = None
    profile: list[Any]
    query: Any = None


class RawGold(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)
    id: str
    output: Answer


class RawGolds(BaseModel):
    golds: list[RawGold]


def read_histories(
    path: Path,
    task: Task,
    outputs: Path | None = None,
    *,
    queries: bool = False,
    on_left_out: Callable[[LeftOut], None] = lambda left_out: None,
) -> list[History]:
    """Read people's histories, and their queries if `queries`; BankError names the person and the item at fault.

    A folder is read by `bank/items/folders.py`, and what cannot be used in it is left out. A file has one of two
    layouts. Per user: a list of `{"user_id", "profile": [item…], "query": [{"id", "input", "gold"}…]}`.
    LaMP's own: a list of questions `{"id", "input", "profile": [item…]}`; with LaMP's `outputs` file, each question
    with its gold answer becomes one more item of that person.
    """
    if path.is_dir():
        if outputs or queries:
            needs = "an outputs file" if outputs else "queries to evaluate on"
            raise BankError(f"{path} is a folder, which has no {needs}: take the last items instead (--last N)")
        return _in_folder(path, task, on_left_out)
    return _in_file(path, task, outputs, queries=queries)


def _in_file(path: Path, task: Task, outputs: Path | None, *, queries: bool) -> list[History]:
    shape = '{"golds": [{"id", "output"}…]}'
    golds = None if outputs is None else {gold.id: gold.output for gold in _read(outputs, RawGolds, shape).golds}
    people: dict[str, dict[str, Item]] = {}
    asked: dict[str, tuple[Query, ...]] = {}
    for raw in _read(path, list[RawPerson], 'a list of people, {"user_id" or "id", "profile": [item…]}'):
        who = f"{path}: person {excerpt(raw.user_id)}"
        if raw.user_id in people and raw.input is None:
            raise BankError(f"{who} appears twice: merge the two entries")
        entries = list(raw.profile)
        if golds is not None:
            if raw.id not in golds:
                raise BankError(f"{path}: question {excerpt(raw.id)} has no gold in {outputs}")
            entries.append({"id": f"question {raw.id}", "input": raw.input, "output": golds[raw.id]})
        items = people.setdefault(raw.user_id, {})
        for position, entry in enumerate(entries):
            try:
                item = parse_item(entry, task, position)
            except ProfileError as error:
                raise BankError(f"{who}: {error}") from error
            items[item.id] = item
        if not items:
            raise BankError(f"{who} has an empty profile: remove this person")
        if queries:
            shape = 'a list of {"id", "input", "gold"}'
            asked[raw.user_id] = _checked(f"{who}: its `query`", raw.query or (), tuple[Query, ...], shape)
            if repeated := [id for id, n in Counter(query.id for query in asked[raw.user_id]).items() if n > 1]:
                raise BankError(f"{who} has several queries with the id {excerpt(repeated[0])}: give each its own")
            if not asked[raw.user_id]:
                raise BankError(
                    f"{who} has no queries to evaluate on: give `query`, or make queries of the last items with "
                    "`mta eval --last N`"
                )
    if not people:
        raise BankError(f"{path} lists no people")
    return [History(user_id, tuple(items.values()), asked.get(user_id, ())) for user_id, items in people.items()]


def _in_folder(path: Path, task: Task, on_left_out: Callable[[LeftOut], None]) -> list[History]:
    people = [read_person(each, task) for each in people_in(path)]
    for left_out in chain.from_iterable(person.left_out for person in people):
        on_left_out(left_out)
    histories = [History(person.user_id, tuple(person.items.values())) for person in people if person.items]
    if not histories:
        raise BankError(f"{path} holds nobody's texts: give each person a folder or an mbox; see `mta bank check`")
    if repeated := [id for id, n in Counter(person.user_id for person in histories).items() if n > 1]:
        raise BankError(f"{path}: {excerpt(repeated[0])} has a folder and a mailbox: put them together")
    return histories


def read_excluded(path: Path) -> frozenset[str]:
    """Read people's ids from a file that is a list of ids or has a layout of `read_histories`."""
    names = _read(path, list[RawName | StrictStr | StrictInt], "a list of ids, or of people with a user_id or an id")
    return frozenset(one.user_id if isinstance(one, RawName) else str(one) for one in names)


def _read(path: Path, kind: Any, shape: str) -> Any:
    try:
        document = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BankError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise BankError(f"{path} is not JSON: {error}") from error
    return _checked(str(path), document, kind, shape)


def _checked(what: str, document: Any, kind: Any, shape: str) -> Any:
    try:
        return TypeAdapter(kind).validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the document"
        raise BankError(f"{what} must hold {shape}; {where}: {first['msg']}, got {excerpt(first['input'])}") from None
