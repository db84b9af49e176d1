"""Fusing ahead of use: in a thread of its own, while the model computes.

Where the worker lives in the engine core's process, the arrival of a request starts the fusion, often a whole step
before the request is scheduled. A step that needs an adapter waits for its fusion and the one that is running.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

from server.engine import patches

if TYPE_CHECKING:
    from server.engine.fusing.manager import FusingLoRAManager

Made = TypeVar("Made")

AHEAD = 32  # fusions that are kept for requests still waiting; those of later ones begin as these are taken


class Ahead(Generic[Made]):
    """Fusions under way and finished ones that nobody has asked for yet; each recipe is fused once, in one thread."""

    def __init__(self, fuse: Callable[[str], Made]) -> None:
        self._fuse = fuse
        self._lock = Lock()
        self._begun: dict[str, Future[Made]] = {}  # those that are not running are fused in this order
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(1, "mta-fuse", torch.set_num_threads, (1,))
        self._pool.submit(int).result()  # the thread starts here, where no core is chosen for it
        torch.set_num_threads(threads)  # it also counts for threads that start later

    def begin(self, name: str, needed: Callable[[], bool] = lambda: True) -> None:
        """Start to fuse a recipe, unless that has begun or it is not needed (which must be quick to say)."""
        with self._lock:
            if name not in self._begun and len(self._begun) < AHEAD and needed():
                self._enter(name)

    def missing(self, names: Iterable[str]) -> set[str]:
        """Those of some recipes that are not fused yet; they are fused in this order, as far as there is room."""
        with self._lock:
            wanted = list(dict.fromkeys(names))
            self._enter_all(wanted[:AHEAD])
            return {name for name in wanted if name not in self._begun or not self._begun[name].done()}

    def hurry(self, names: Iterable[str]) -> None:
        """Have these fused next, in this order."""
        with self._lock:
            first = list(dict.fromkeys(names))
            self._enter_all(first)
            self._begun = {name: self._begun[name] for name in first} | self._begun

    def take(self, name: str) -> Made:
        """What a recipe stands for; waits for its fusion, which is hurried. `done` comes after it.

        The thread does it even if it has not begun: with its caller's several threads the same work takes many times
        as long on a machine whose cores are busy.
        """
        self.hurry([name])
        return self._begun[name].result()

    def done(self, name: str) -> None:
        """Keep it no longer: it is now where `needed` looks."""
        with self._lock:
            self._begun.pop(name, None)

    def forget(self, names: Iterable[str]) -> None:
        """Leave nothing of these; waits for the one that is running."""
        with self._lock:
            begun = [self._begun.pop(name) for name in names if name in self._begun]
        for future in begun:
            if not future.cancel():
                future.exception()

    @property
    def names(self) -> list[str]:
        """The recipes whose fusion is under way or kept."""
        with self._lock:
            begun = list(self._begun.items())
        return [name for name, future in begun if not future.done() or future.exception() is None]

    def _enter_all(self, names: Sequence[str]) -> None:
        """Begin what has not begun or has failed; what else is kept makes room, the oldest first."""
        others = [name for name in self._begun if name not in names]
        for name in names:
            begun = self._begun.get(name)
            if begun is None or (begun.done() and begun.exception() is not None):
                if len(self._begun) >= AHEAD and others:
                    self._begun.pop(others.pop(0)).cancel()
                self._enter(name)

    def _enter(self, name: str) -> None:
        self._begun[name] = Future()
        self._pool.submit(self._fuse_next)

    def _fuse_next(self) -> None:
        """Fuse the first that nobody fuses yet, if any is left; runs as often as one was entered."""
        with self._lock:
            todo = ((name, future) for name, future in self._begun.items() if not future.running() | future.done())
            name, future = next(todo, ("", None))
            if future is None:
                return
            future.set_running_or_notify_cancel()
        try:
            future.set_result(self._fuse(name))
        except BaseException as error:
            future.set_exception(error)


def on_arrival(fuser: FusingLoRAManager) -> None:
    """Tell a fuser of each request that this process's engine core, if any, receives, and the scheduler of it."""
    if "vllm.v1.engine.core" not in sys.modules:
        return

    def noticing(preprocess: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def notice_and_preprocess(self: Any, request: Any) -> Any:  # named as in the table, which is checked again
            if request.lora_request is not None:
                self.scheduler.fuser = fuser
                fuser.notice(request.lora_request)
            return preprocess(self, request)

        return notice_and_preprocess

    patches.replace(patches.ARRIVAL, noticing)
