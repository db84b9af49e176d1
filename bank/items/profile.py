"""A user's items: what is accepted, what is embedded, what is trained on, and the embedding of them all."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters.errors import excerpt
from bank.errors import ProfileError
from bank.items.tasks import Task

MAX_ID_CHARS = 256
PAIR = ("input", "output")
PLAIN = "text"

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a user's history: the fields that mean something to the task. Without an id, it has its hash."""

    id: str
    fields: Mapping[str, str]


def parse_item(raw: object, task: Task, position: int) -> Item:
    """Read one item: the task's own fields as in LaMP's files, an `{"input", "output"}` pair, or plain `{"text"}`.

    Fields that mean nothing to the task are ignored. ProfileError names the field at fault.
    """
    where = f"items.{position}"
    if not isinstance(raw, Mapping):
        raise ProfileError(f"{where} must be an object, got {excerpt(raw)}", where)
    fields = {}
    for name in dict.fromkeys((*task.fields, *PAIR, PLAIN)):
        text = _text(raw.get(name), f"{where}.{name}")
        if text.strip():
            fields[name] = text
    if not (is_pair(fields) or any(name in fields for name in (*task.text, PLAIN) if name not in PAIR)):
        given = next((name for name in PAIR if name in fields), None)
        missing = {"input": "output", "output": "input"}[given] if given else PLAIN
        raise ProfileError(
            f"{where}.{missing} is missing or blank: give {_shapes(task)}, got {excerpt(dict(raw))}",
            f"{where}.{missing}",
        )
    return Item(_identity(raw.get("id"), fields, f"{where}.id"), fields)


def item_text(item: Item, task: Task) -> str:
    """The text that represents the item in the profile's embedding; all it has if it was made for another task."""
    if is_pair(item.fields):
        turn, output = (item.fields[name] for name in PAIR)
        return f"{turn.removeprefix(task.instruction)}\n{output}"
    own = [name for name in task.text if name in item.fields]
    names = own or ([PLAIN] if PLAIN in item.fields else item.fields)
    return "\n".join(item.fields[name] for name in names)


def item_pair(item: Item, task: Task) -> tuple[str, str] | None:
    """The (input, output) pair to train on, or None for an item of plain text."""
    if is_pair(item.fields):
        return item.fields["input"], item.fields["output"]
    if all(name in item.fields for name in task.pair_fields):
        return task.input.format_map(item.fields), task.output.format_map(item.fields)
    return None


def is_pair(fields: Mapping[str, str]) -> bool:
    """Whether the fields are a ready (input, output) pair, whatever the task."""
    return all(name in fields for name in PAIR)


def profile_embedding(vectors: Vectors) -> Vectors:
    """The profile's embedding [E] float32: the mean of its items' [n, E], at unit length; zeros if they cancel out."""
    if len(vectors) == 0:
        raise ProfileError("a profile needs at least one item")
    mean = np.asarray(vectors, dtype=np.float64).mean(axis=0)
    norm = float(np.linalg.norm(mean))
    return np.asarray(mean / norm if norm > 0 else mean, dtype=np.float32)


def _text(value: object, param: str) -> str:
    """A field as text; numbers (a rating) are spelled out, an absent field is empty."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ProfileError(f"{param} must be text, got {excerpt(value)}", param)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ProfileError(f"{param} must be a finite number or text, got {value}", param)
        return repr(value).removesuffix(".0")
    text = str(value)
    if "\0" in text or has_surrogate(text):
        raise ProfileError(f"{param} holds a NUL or a lone surrogate, which are not valid text: {excerpt(text)}", param)
    return text


def has_surrogate(text: str) -> bool:
    """Whether a text holds a lone surrogate: half a character, which UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _identity(given: object, fields: Mapping[str, str], param: str) -> str:
    if given is None:
        content = json.dumps(fields, sort_keys=True, ensure_ascii=False).encode()
        return hashlib.sha256(content).hexdigest()[:32]
    text = _text(given, param)
    if not text.strip() or len(text) > MAX_ID_CHARS:
        raise ProfileError(f"{param} must be 1 to {MAX_ID_CHARS} characters, got {excerpt(given)}", param)
    return text


def _shapes(task: Task) -> str:
    own = ", ".join(f'"{name}"' for name in task.fields)
    return f'{{{own}}}, {{"input", "output"}} or {{"text"}}'
