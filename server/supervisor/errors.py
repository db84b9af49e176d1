"""Errors of `mta up`; the whole tree is drawn in `adapters/errors.py`."""

from __future__ import annotations

from adapters.errors import MtaError


class StartError(MtaError):
    """Something that `mta up` needs is taken, missing, or did not become ready; the message says which and why."""
