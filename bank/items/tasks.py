"""Tasks: templates (`tasks.toml`) that turn items into text to embed and pairs; never applied to requests."""

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

# Numbers of past items in training prompts, equally frequent: mostly one text, but more labels or scores.
PAST_COUNTS: Mapping[AnswerKind, tuple[int, ...]] = {"text": (1, 1, 1, 2, 3), "labels": (1, 3, 9), "score": (1, 3, 9)}


def past_count_range(kind: AnswerKind) -> tuple[int, int]:
    """Return the smallest and the largest number of past items in training prompts, which evaluations measure."""
    return min(PAST_COUNTS[kind]), max(PAST_COUNTS[kind])


@dataclass(frozen=True, slots=True)
class Task:
    """The templates of one task; `tasks.toml` describes the fields."""

    name: str
    input: str
    output: str
    text: tuple[str, ...]
    memory: str
    remembering: str = "{memories}. {input}"
    kind: AnswerKind = "text"
    lamp: str | None = None
    begun: str = ""
    bare: str = ""
    mail: str = ""
    reply: str = ""

    @property
    def pair_fields(self) -> tuple[str, ...]:
        return _placeholders(self.input + self.output)

    @property
    def memory_fields(self) -> tuple[str, ...]:
        return _placeholders(self.memory)

    @property
    def fields(self) -> tuple[str, ...]:
        """All fields of an item that this task uses."""
        return tuple(dict.fromkeys((*self.text, *self.pair_fields)))

    @property
    def drafted(self) -> bool:
        """Whether people bring drafts, which become texts in their own words."""
        return "draft" in self.pair_fields

    def turn(self, given: str) -> str:
        """Return what an app sends as a user turn as this task words it: a draft alone is none yet."""
        return self.input.format(draft=given) if self.drafted else given

    @property
    def instruction(self) -> str:
        """The turn's text before its first field; it is the same for everybody, so it is never embedded."""
        return self.input.partition("{")[0]

    @property
    def labels(self) -> tuple[str, ...]:
        """The allowed answers, which the instruction lists in brackets; empty unless `kind` is labels."""
        listed = re.search(r"\[([^\]]+)\]", self.instruction) if self.kind == "labels" else None
        return tuple(label.strip() for label in listed[1].split(",")) if listed else ()


def _placeholders(template: str) -> tuple[str, ...]:
    names = (name for _, name, _, _ in string.Formatter().parse(template) if name)
    return tuple(dict.fromkeys(names))


@cache
def tasks() -> Mapping[str, Task]:
    document = tomllib.loads(resources.files("bank.items").joinpath("tasks.toml").read_text("utf-8"))
    return {name: Task(name, **raw | {"text": tuple(raw["text"])}) for name, raw in document.items()}


def get_task(name: str) -> Task:
    try:
        return tasks()[name]
    except KeyError:
        raise BankError(f"unknown task {excerpt(name)}; the tasks are: {', '.join(tasks())}") from None
