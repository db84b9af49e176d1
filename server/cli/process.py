"""What the long-running commands set up for themselves before anything heavy is imported."""

from __future__ import annotations

import logging
import os


def log_to_stderr() -> None:
    """Our own lines from INFO on, others' from WARNING on."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s %(message)s", level=logging.WARNING)
    logging.getLogger("mta").setLevel(logging.INFO)


def prepare_to_train(threads: int | None = None) -> None:
    """Torch's threads: how many, all cores without a number, and how they wait. Read when torch is loaded.

    They spin for a moment at each barrier, then sleep. Spinning on, as is the default, makes training many times slower
    where anything else runs beside it; never spinning halves its speed on an idle machine.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
