"""What the long-running commands set up for themselves before anything heavy is imported."""

from __future__ import annotations

import os


def prepare_to_train(threads: int | None = None) -> None:
    """Set how many threads torch has (all cores by default) and how they wait; torch reads it when it is loaded.

    They spin for a moment at each barrier, then sleep. Spinning on, the default, makes training many times slower when
    anything else runs beside it; never spinning halves its speed on an idle machine.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
