"""Imports that take seconds, in fewer of them, and the end of a process that has made them."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

UNUSED = ("sklearn", "scipy")  # transformers loads them if it can, for speculative decoding and object detectors


@contextmanager
def heavy_imports(*for_later: str) -> Iterator[None]:
    """Import what the block imports without collecting garbage, a fifth of the time, and without what nobody uses.

    The block goes without the modules `for_later`, which can be imported after it. `UNUSED`, where it was not loaded
    before, looks as if it were not installed for as long as the process runs.
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


def run_to_the_end(main: Callable[[], object]) -> None:
    """Run a process's main function; where it made heavy imports, the process ends with it, at once.

    Else the interpreter would be torn down: seconds of work, and nanobind takes what `heavy_imports` keeps for leaks,
    which it lists where people look for the reason of the end.
    """
    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code
        if not gc.get_freeze_count():
            raise
    except BaseException as error:
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
        if not gc.get_freeze_count():
            raise
        traceback.print_exc()
    if not gc.get_freeze_count():
        return
    if isinstance(status, str):
        print(status, file=sys.stderr)
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))
