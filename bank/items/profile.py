"""A user's items: validation, text to embed, pairs to train on, and the profile's embedding."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adapters.errors import excerpt
from bank.errors import ProfileError
from bank.items.drafts import notes_of
from bank.items.tasks import Task

MAX_ID_CHARS = 256
PAIR = ("input", "output")
PLAIN = "text"

SHORTEST, LONG = 12, 400  # characters of a plain text that is a sample; that is a lesson in a history, and is split
OPENING = 40, 240  # characters of a long text's opening, which ends with a sentence or a line, else between two words
_END = re.compile(r"""[.!?…]["'”’)\]]*(?=\s)|[。！？]|\n""")

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Item:
    """One item of a user's history, with the fields that the task uses; the default id is a hash of the fields."""

    id: str
    fields: Mapping[str, str]


def parse_item(raw: object, task: Task, position: int) -> Item:
    """Parse one item: the task's own fields as in LaMP's files, an `{"input", "output"}` pair, or plain `{"text"}`.

    Other fields are ignored. ProfileError names the field at fault.
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
        own = ", ".join(f'"{name}"' for name in task.fields)
        shapes = ", ".join(dict.fromkeys((f"{{{own}}}", '{"input", "output"}'))) + ' or {"text"}'
        param = f"{where}.{missing}"
        raise ProfileError(f"{param} is missing or blank: give {shapes}, got {excerpt(dict(raw))}", param)
    return Item(_identity(raw.get("id"), fields, f"{where}.id"), fields)


def item_text(item: Item, task: Task) -> str:
    """Return the text to embed for the item; all its fields if it was made for another task."""
    if is_pair(item.fields):
        turn, output = (item.fields[name] for name in PAIR)
        return f"{turn.removeprefix(task.instruction)}\n{output}"
    own = [name for name in task.text if name in item.fields]
    names = own or ([PLAIN] if PLAIN in item.fields else item.fields)
    return "\n".join(item.fields[name] for name in names)


def item_pair(item: Item, task: Task) -> tuple[str, str] | None:
    """Return the (input, output) pair to train on; None for a plain text that teaches nothing in this task."""
    if (given := _given_pair(item, task)) is not None:
        return given
    return text_pair(item.fields[PLAIN], task, LONG) if PLAIN in item.fields else None


def text_pair(text: str, task: Task, shortest: int = SHORTEST) -> tuple[str, str] | None:
    """Return a plain text as a pair: a long one's rest after its opening, a short one after a bare turn.

    Where drafts are rewritten, the text is that of its own notes. None if it has less than `shortest` characters, or
    people do not write freely in this task.
    """
    text = text.strip()
    if task.drafted and (notes := notes_of(text)):
        return task.input.format(draft=notes), text
    if not task.begun or len(normalised(text)) < shortest:
        return None
    if len(text) < LONG:
        return task.bare, text
    least, most = OPENING
    end = _END.search(text, least)
    cut = end.end() if end and end.end() <= most else text.rfind(" ", least, most)
    cut = most if cut < 0 else cut
    return task.begun.format(opening=text[:cut].strip()), text[cut:].strip()


def untaught(text: str, task: Task, shortest: int = LONG) -> str:
    """Say why a plain text teaches nothing in this task, and what to do."""
    if task.begun:
        return f"{excerpt(text)} is too short to learn from: a text needs at least {shortest} characters, or an input"
    fields = ", ".join(task.pair_fields)
    return f"the bank's task, {task.name}, learns from no text alone: send {fields}, or input and output"


def normalised(text: str) -> str:
    """Return a text in lower case with single spaces: two that differ in these alone tell the same."""
    return " ".join(text.casefold().split())


def own_texts(items: Iterable[Item], task: Task) -> list[str]:
    """Return what a person wrote themselves: the outputs of pairs, and plain texts."""
    outputs = ((_given_pair(item, task) or ("", item.fields.get(PLAIN, "")))[1] for item in items)
    return [text for text in outputs if text.strip()]


def _given_pair(item: Item, task: Task) -> tuple[str, str] | None:
    if is_pair(item.fields):
        return item.fields["input"], item.fields["output"]
    if all(name in item.fields for name in task.pair_fields):
        return task.input.format_map(item.fields), task.output.format_map(item.fields)
    return None


def is_pair(fields: Mapping[str, str]) -> bool:
    """Whether the fields are an (input, output) pair, which is valid in any task."""
    return all(name in fields for name in PAIR)


def profile_embedding(vectors: Vectors) -> Vectors:
    """Return the profile's embedding [E] float32: the unit-length mean of its items' [n, E]; zeros if the mean is 0."""
    if len(vectors) == 0:
        raise ProfileError("a profile needs at least one item")
    mean = np.asarray(vectors, dtype=np.float64).mean(axis=0)
    norm = float(np.linalg.norm(mean))
    return np.asarray(mean / norm if norm > 0 else mean, dtype=np.float32)


def _text(value: object, param: str) -> str:
    """Return a field as text; numbers, such as ratings, are converted, and an absent field is empty."""
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ProfileError(f"{param} must be text, got {excerpt(value)}", param)
    if isinstance(value, float) and not math.isfinite(value):
        raise ProfileError(f"{param} must be a finite number or text, got {value}", param)
    text = str(number_text(value))
    if "\0" in text or has_surrogate(text):
        raise ProfileError(f"{param} has a NUL or a lone surrogate, which are not valid text: {excerpt(text)}", param)
    return text


def number_text(value: object) -> object:
    """Return a number as people write it, a whole one without its point: `4.0` is a rating of 4."""
    return repr(value).removesuffix(".0") if isinstance(value, float) else value


def has_surrogate(text: str) -> bool:
    """Whether a text contains a lone surrogate, half of a UTF-16 pair, which UTF-8 cannot encode."""
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
