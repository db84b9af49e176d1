"""Imports that take seconds, in fewer of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("sklearn", "scipy")
"""transformers loads them, where they are installed, for speculative decoding and for losses of object detectors."""


@contextmanager
def heavy_imports(*for_later: str) -> Iterator[None]:
    """Import what the block imports without collecting garbage, a fifth of the time, and without what nobody uses.

    Args:
        for_later: modules that the block looks for, but goes without; they can be imported after it. `UNUSED`, where
            it was not loaded before, looks as if it were not installed for as long as the process runs.
    """
    for name in (*UNUSED, *for_later):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    gc.disable()
    try:
        yield
    finally:
        for name in for_later:
            if sys.modules[name] is None:
                del sys.modules[name]
        gc.enable()
        gc.freeze()  # what was imported stays: it need not be looked at again
