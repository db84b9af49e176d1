"""Errors of the bank layer; their base class is in `adapters/errors.py`."""

from __future__ import annotations

from adapters.errors import MtaError


class BankError(MtaError):
    """A bank, a base model or an embedder is missing, damaged, or incompatible with the others."""


class ProfileError(BankError, ValueError):
    """An item is not valid in a profile; `param` is the request field at fault, e.g. `items.3.text`."""

    def __init__(self, message: str, param: str = "items") -> None:
        super().__init__(message)
        self.param = param
