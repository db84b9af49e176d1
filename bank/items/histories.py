"""People's histories from files: the LaMP per-user layout, or LaMP's own questions with their outputs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.errors import excerpt
from bank.errors import BankError, ProfileError
from bank.items.profile import Item, item_pair, parse_item
from bank.items.tasks import Task


@dataclass(frozen=True, slots=True)
class History:
    """One person's items, at least one, in the order of the file; their id never enters a bank."""

    user_id: str
    items: tuple[Item, ...]

    def pairs(self, task: Task) -> list[tuple[str, str]]:
        """The (input, output) pairs to train on; items of plain text give none."""
        return [pair for item in self.items if (pair := item_pair(item, task)) is not None]


def read_histories(path: Path, task: Task, outputs: Path | None = None) -> list[History]:
    """Read people's histories; BankError names the person and the item at fault.

    There are two layouts. Per user: a list of `{"user_id", "profile": [item…]}`; queries beside the profile are not
    read: they are for evaluation. LaMP's own: a list of questions `{"id", "input", "profile": [item…]}`; with
    `outputs`, LaMP's outputs file, each question and its gold answer are one more item of that person.
    """
    golds = _read_golds(outputs) if outputs is not None else None
    people: dict[str, dict[str, Item]] = {}
    for position, raw in enumerate(_read_list(path)):
        user_id, entries = _person(path, position, raw, golds)
        if user_id in people and "input" not in raw:
            raise BankError(f"{path}: person {excerpt(user_id)} appears twice: join the two entries")
        items = people.setdefault(user_id, {})
        for place, entry in enumerate(entries):
            try:
                item = parse_item(entry, task, place)
            except ProfileError as error:
                raise BankError(f"{path}: person {excerpt(user_id)}: {error}") from error
            items[item.id] = item
        if not items:
            raise BankError(f"{path}: person {excerpt(user_id)} has an empty profile: leave them out")
    if not people:
        raise BankError(f"{path} lists no people")
    return [History(user_id, tuple(items.values())) for user_id, items in people.items()]


def read_excluded(path: Path) -> frozenset[str]:
    """The ids of people to leave out, from a file in a layout of `read_histories` or a list of ids; else BankError."""
    ids = set()
    for position, raw in enumerate(_read_list(path)):
        found = identity_of(raw) if isinstance(raw, Mapping) else raw
        if isinstance(found, bool) or not isinstance(found, str | int):
            raise BankError(f"{path}: entry {position} names nobody: give an id or user_id, got {excerpt(raw)}")
        ids.add(str(found))
    return frozenset(ids)


def identity_of(raw: Mapping[str, Any]) -> Any:
    """What an entry names its person by; in LaMP's own files that is the question's id."""
    return raw.get("user_id", raw.get("id"))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise BankError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise BankError(f"{path} is not JSON: {error}") from error


def _read_list(path: Path) -> Iterator[Any]:
    document = _read_json(path)
    if not isinstance(document, list):
        raise BankError(f"{path} must hold a list of people, got {excerpt(document)}")
    yield from document


def _read_golds(path: Path) -> dict[str, str]:
    document = _read_json(path)
    golds = document.get("golds") if isinstance(document, Mapping) else None
    if not isinstance(golds, list):
        raise BankError(f'{path} must hold {{"task", "golds": [{{"id", "output"}}…]}}, got {excerpt(document)}')
    answers = {}
    for position, gold in enumerate(golds):
        if not isinstance(gold, Mapping) or "id" not in gold or not isinstance(gold.get("output"), str):
            raise BankError(f'{path}: gold {position} must be {{"id", "output"}}, got {excerpt(gold)}')
        answers[str(gold["id"])] = gold["output"]
    return answers


def _person(path: Path, position: int, raw: Any, golds: Mapping[str, str] | None) -> tuple[str, list[Any]]:
    """One entry's person and raw items."""
    if not isinstance(raw, Mapping):
        raise BankError(f"{path}: entry {position} must be an object, got {excerpt(raw)}")
    identity = identity_of(raw)
    if isinstance(identity, bool) or not isinstance(identity, str | int):
        raise BankError(f"{path}: entry {position} has no user_id (or, in LaMP's own files, no id)")
    profile = raw.get("profile")
    if not isinstance(profile, list):
        raise BankError(f"{path}: person {excerpt(identity)} has no profile: a list of items, got {excerpt(profile)}")
    if golds is None:
        return str(identity), profile
    question = str(raw.get("id"))
    if question not in golds:
        raise BankError(f"{path}: question {excerpt(question)} has no gold in the outputs file")
    return str(identity), [
        *profile,
        {"id": f"question {question}", "input": raw.get("input"), "output": golds[question]},
    ]
