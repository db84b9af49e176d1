"""Base classes of the project's errors. Every message names the problem, the offending value and the remedy."""

from __future__ import annotations

import itertools
import reprlib
import sys
from typing import Any


class MtaError(Exception):
    """Base class of all errors that this project raises on purpose."""


class RecipeError(MtaError, ValueError):
    """The name is not a canonical recipe, or the weights cannot form one (see `adapters/recipe.py`)."""


class FusionError(MtaError, ValueError):
    """The recipe is well-formed, but this bank cannot provide it."""


class UserAdapterError(MtaError, ValueError):
    """The bytes are not a user adapter, or this bank cannot serve the adapter."""


class TrainingError(MtaError, ValueError):
    """Training cannot start, or its loss diverges."""


class _PrefixRepr(reprlib.Repr):
    """A `repr` that reads only the beginning of a large or deeply nested value."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist = 3, 8, 8
        self.maxlong = self.maxother = sys.maxsize  # `excerpt` cuts at the end; reprlib would cut in the middle
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
        return "{" + ", ".join(pairs + ["..."] * (len(value) > self.maxdict)) + "}"  # reprlib would sort all keys


def excerpt(value: object, limit: int = 80) -> str:
    """Return `repr(value)` cut to `limit` characters, for error messages."""
    text = _PrefixRepr(limit).repr(value)
    return shortened(text[:-1], limit - 1) + text[-1] if isinstance(value, str) else shortened(text, limit)


def shortened(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
