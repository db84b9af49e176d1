"""Imports that take seconds, in fewer of them."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Import what the block imports without collecting garbage, a fifth of the time, and without scikit-learn.

    transformers loads scikit-learn, and SciPy with it, for one kind of speculative decoding. In a process that has
    not loaded it before, this makes it look as if it were not installed, for good.
    """
    sys.modules.setdefault("sklearn", None)  # type: ignore[arg-type]
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()  # what was imported stays: it need not be looked at again
