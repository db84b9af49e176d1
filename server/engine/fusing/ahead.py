"""Fusing ahead of use: in a thread of its own, while the model computes.

The engine core hears of a request in the thread that receives it, often a whole step before it can be scheduled. Where
the worker lives in the same process, that moment starts the fusion; the step that needs it waits for what is left.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any, Generic, TypeVar

import torch

Made = TypeVar("Made")

AHEAD = 32
"""Fusions that are kept for requests still waiting; what comes after that is fused when it is needed."""

STALE_S = 60.0
"""Age after which one that nobody has taken, because its request was aborted, may go for another."""


class Ahead(Generic[Made]):
    """Fusions under way and finished ones that nobody has asked for yet; each recipe is fused once.

    Args:
        fuse: makes what a recipe's name stands for; called in any thread.
        clock: seconds.
    """

    def __init__(self, fuse: Callable[[str], Made], clock: Callable[[], float] = time.monotonic) -> None:
        self._fuse = fuse
        self._clock = clock
        self._lock = Lock()
        self._begun: OrderedDict[str, tuple[Future[Made], float]] = OrderedDict()
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(1, "mta-fuse", torch.set_num_threads, (1,))
        self._pool.submit(int).result()  # the thread starts here, where no core is chosen for it
        torch.set_num_threads(threads)  # it also counts for threads that start later

    def begin(self, name: str, needed: Callable[[], bool] = lambda: True) -> None:
        """Start to fuse a recipe, unless that has begun or it is not needed (which must be quick to say)."""
        with self._lock:
            if name in self._begun or not needed():
                return
            if len(self._begun) >= AHEAD:
                oldest, (_, since) = next(iter(self._begun.items()))
                if self._clock() - since < STALE_S:
                    return
                del self._begun[oldest]
            self._begun[name] = self._pool.submit(self._fuse, name), self._clock()

    def take(self, name: str) -> Made:
        """What a recipe stands for. Waits for its fusion if that runs, else does it here; `done` comes after it."""
        with self._lock:
            begun, _ = self._begun.get(name, (None, 0.0))
        if begun is None or begun.cancel() or begun.exception() is not None:
            return self._fuse(name)
        return begun.result()

    def done(self, name: str) -> None:
        """Keep it no longer: whoever took it holds it where `needed` looks."""
        with self._lock:
            self._begun.pop(name, None)

    def forget(self, names: Iterable[str]) -> None:
        """Leave nothing of these; waits for one that is running."""
        with self._lock:
            begun = [self._begun.pop(name) for name in names if name in self._begun]
        for future, _ in begun:
            if not future.cancel():
                future.exception()

    @property
    def names(self) -> list[str]:
        """The recipes whose fusion is under way or kept."""
        with self._lock:
            begun = [(name, future) for name, (future, _) in self._begun.items()]
        return [name for name, future in begun if not future.done() or future.exception() is None]


def on_arrival(notice: Callable[[Any], None]) -> None:
    """Have this process's engine core, if it has one, pass on the adapter of each request when it is received."""
    core: Any = sys.modules.get("vllm.v1.engine.core")
    if core is None:
        return
    preprocess = core.EngineCore.preprocess_add_request

    def notice_and_preprocess(self: Any, request: Any) -> Any:
        if request.lora_request is not None:
            notice(request.lora_request)
        return preprocess(self, request)

    core.EngineCore.preprocess_add_request = notice_and_preprocess
