"""The engine core as a fork of the API process, on CPU: it need not import all of vLLM a second time.

vLLM can fork its core, and starts no thread before it has. But its CPU platform insists on spawning it, and there are
two reasons to. It preloads libraries into the core; here the whole engine process has them from its start
(`preloads`). And a process that has computed cannot go on to compute in a fork: OpenMP would wait for the threads of
its team, which a fork does not have. But teams belong to threads, so the core is forked by a thread that has none.

A tiny model is served after 10.6 seconds of CPU time instead of 24.3, in 0.3 GiB less (two cores, vLLM 0.32).
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from typing import Any

from server.engine import patches

METHOD = "VLLM_WORKER_MULTIPROC_METHOD"
_PRELOADED = (
    ("vllm", "libs/libtcmalloc_minimal*.so*", ("libtcmalloc",)),
    ("torch", "../torch.libs/libgomp*.so*", ("libgomp", "libomp", "libiomp")),
    ("torch", "lib/libgomp*.so*", ("libgomp", "libomp", "libiomp")),
)
"""What vLLM preloads: its package, where it lies there, and the libraries beside which vLLM leaves it out."""


def preloads(given: str) -> str:
    """The value of LD_PRELOAD with which vLLM would spawn its core, `given` the one so far; imports nothing."""
    libraries = [given] if given else []
    for package, pattern, alike in _PRELOADED:
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.origin or any(name in library for library in libraries for name in alike):
            continue
        libraries += [str(path) for path in sorted(Path(spec.origin).parent.glob(pattern))[:1]]
    return ":".join(libraries)


class _ForkedProcess(ForkProcess):
    """A process forked by a thread made for that; in the fork it is the main thread."""

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802  multiprocessing's name
        started: list[Any] = []
        thread = threading.Thread(target=lambda: started.append(ForkProcess._Popen(process_obj)))
        thread.start()
        thread.join()
        if not started:
            raise OSError("the engine core could not be forked: the lines above say why")
        return started[0]


class CoreContext(ForkContext):
    """How multiprocessing makes processes that may compute, in a process that has computed."""

    Process = _ForkedProcess


def install() -> None:
    """Have the CPU platform fork a core that runs its model itself (`executor.py`); with more ranks it spawns them."""

    def forking(settle: Callable[[Any], None]) -> Any:
        def settle_but_fork(config: Any) -> None:
            settle(config)
            if config.parallel_config.world_size == 1:
                os.environ[METHOD] = "fork"

        return staticmethod(settle_but_fork)

    def choosing(choose_context: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: CoreContext() if os.environ.get(METHOD) == "fork" else choose_context()

    patches.replace(patches.CPU_CONFIG, forking)
    patches.replace(patches.CPU_CONTEXT, choosing)
