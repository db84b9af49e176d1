"""Errors of the bank's layer; the root is in `adapters/errors.py`."""

from __future__ import annotations

from adapters.errors import MtaError


class BankError(MtaError):
    """A bank, a base model or an embedder that is missing, damaged, or not made for the other two."""


class ProfileError(BankError, ValueError):
    """Items that cannot be part of a profile; `param` says where the fault is in the request, e.g. `items.3.text`."""

    def __init__(self, message: str, param: str = "items") -> None:
        super().__init__(message)
        self.param = param
