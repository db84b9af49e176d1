"""The root of the project's error tree.

    MtaError
    ├── RecipeError       a name that is no canonical recipe, or weights that make none
    ├── FusionError       a recipe that this bank cannot fuse
    ├── UserAdapterError  bytes that are no user adapter, or none for this bank
    ├── TrainingError     samples or a rate that nothing can be trained with
    ├── BankError         a bank that cannot be read, or must not be used        (bank/errors.py)
    │   └── ProfileError  items that no profile can be made of
    ├── ApiError          what a client is told, with its HTTP status            (server/errors.py)
    └── StartError        a part that `mta up` cannot start                      (server/supervisor/errors.py)

Every message says what was wrong, the offending value, and what to do.
"""

from __future__ import annotations


class MtaError(Exception):
    """Anything this project raises on purpose."""


class RecipeError(MtaError, ValueError):
    """A recipe name or its parts break the grammar (see `adapters/recipe.py`)."""


class FusionError(MtaError, ValueError):
    """A well-formed recipe asks for something that the bank at hand cannot give."""


class UserAdapterError(MtaError, ValueError):
    """Bytes that are no user adapter, or one that this bank cannot serve."""


class TrainingError(MtaError, ValueError):
    """Training that cannot begin, or whose loss explodes."""


def excerpt(value: object, limit: int = 80) -> str:
    """`repr(value)` cut to `limit` characters: error messages quote the offending value, never a megabyte."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
