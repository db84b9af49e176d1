"""Tasks: the templates that turn a history's items into text to embed and pairs to train on.

The templates are data (`tasks.toml`). They are never applied to a request: a prompt is already a complete user turn.
"""

from __future__ import annotations

import re
import string
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from adapters.errors import excerpt
from bank.errors import BankError

AnswerKind = Literal["labels", "score", "text"]

PAST_COUNTS: Mapping[AnswerKind, tuple[int, ...]] = {"text": (1, 1, 1, 2, 3), "labels": (1, 3, 9), "score": (1, 3, 9)}
"""How many past items prompts get, each equally often: mostly one text, and more where each says little."""


def past_count_range(kind: AnswerKind) -> tuple[int, int]:
    """The fewest and the most past items that rows are trained with: what is measured of them."""
    return min(PAST_COUNTS[kind]), max(PAST_COUNTS[kind])


@dataclass(frozen=True, slots=True)
class Task:
    """What one task's items look like; the fields are described in `tasks.toml`."""

    name: str
    lamp: str | None
    input: str
    output: str
    text: tuple[str, ...]
    memory: str
    remembering: str = "{memories}. {input}"
    kind: AnswerKind = "text"

    @property
    def pair_fields(self) -> tuple[str, ...]:
        return _placeholders(self.input + self.output)

    @property
    def memory_fields(self) -> tuple[str, ...]:
        return _placeholders(self.memory)

    @property
    def fields(self) -> tuple[str, ...]:
        """Every field of an item that means something to this task."""
        return tuple(dict.fromkeys((*self.text, *self.pair_fields)))

    @property
    def instruction(self) -> str:
        """The words of the turn before its first field: the same for everybody, so never embedded."""
        return self.input.partition("{")[0]

    @property
    def labels(self) -> tuple[str, ...]:
        """The possible answers, which the instruction lists in brackets; empty unless `kind` is labels."""
        found = re.search(r"\[([^\]]+)\]", self.instruction) if self.kind == "labels" else None
        return tuple(label.strip() for label in found[1].split(",")) if found else ()


def _placeholders(template: str) -> tuple[str, ...]:
    names = (name for _, name, _, _ in string.Formatter().parse(template) if name)
    return tuple(dict.fromkeys(names))


@cache
def tasks() -> Mapping[str, Task]:
    document = tomllib.loads(resources.files("bank.items").joinpath("tasks.toml").read_text("utf-8"))
    return {
        name: Task(name, **raw | {"lamp": raw.get("lamp"), "text": tuple(raw["text"])})
        for name, raw in document.items()
    }


def get_task(name: str) -> Task:
    try:
        return tasks()[name]
    except KeyError:
        raise BankError(f"unknown task {excerpt(name)}; the tasks are: {', '.join(tasks())}") from None
