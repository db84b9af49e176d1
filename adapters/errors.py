"""The root of the project's error tree. Every message says what was wrong, the offending value, and what to do."""

from __future__ import annotations

import itertools
import reprlib
import sys
from typing import Any


class MtaError(Exception):
    """Anything this project raises on purpose."""


class RecipeError(MtaError, ValueError):
    """A name that is not a canonical recipe, or weights that cannot make one (see `adapters/recipe.py`)."""


class FusionError(MtaError, ValueError):
    """A well-formed recipe that asks for something that this bank cannot provide."""


class UserAdapterError(MtaError, ValueError):
    """Bytes that are not a user adapter, or one that this bank cannot serve."""


class TrainingError(MtaError, ValueError):
    """Training that cannot begin, or whose loss explodes."""


class _Beginning(reprlib.Repr):
    """`repr` that looks only at the beginning of a value, however large or deep it is."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist = 3, 8, 8
        self.maxlong = self.maxother = sys.maxsize  # cut at their end, not in the middle
        self._limit = limit

    def repr_str(self, text: Any, level: int) -> str:
        return repr(text[: self._limit])

    repr_bytes = repr_str

    def repr_dict(self, value: dict[Any, Any], level: int) -> str:
        if level <= 0 and value:
            return "{...}"
        pairs = [
            f"{self.repr1(key, level - 1)}: {self.repr1(inner, level - 1)}"
            for key, inner in itertools.islice(value.items(), self.maxdict)
        ]
        return "{" + ", ".join(pairs + ["..."] * (len(value) > self.maxdict)) + "}"  # reprlib's version sorts all keys


def excerpt(value: object, limit: int = 80) -> str:
    """`repr(value)` cut to `limit` characters: error messages quote the offending value, never a megabyte."""
    return shortened(_Beginning(limit).repr(value), limit)


def shortened(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
