"""What the long-running commands set up for themselves before anything heavy is imported."""

from __future__ import annotations

import os
import signal


def prepare_to_train(threads: int | None = None, *, gpu: bool = True) -> None:
    """Set how many threads torch has (all cores by default), how they wait, and whether it may see a GPU.

    Torch reads it when it is loaded.

    They spin for a moment at each barrier, then sleep. Spinning on, the default, makes training many times slower when
    anything else runs beside it; never spinning halves its speed on an idle machine.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if threads is not None:
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if not gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def end_on_signals() -> None:
    """Have SIGINT and SIGTERM end a process in which there is nothing to close yet, until its event loop takes over.

    The default action would not do: the kernel spares process 1, which this is in a container. Nor would an exception,
    which a callback of the interpreter may swallow.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(0))
