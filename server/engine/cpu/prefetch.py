"""Fuse adapters ahead of use, in a separate thread, while the model computes.

If the worker shares the engine core's process, the arrival of a request starts its fusion, often a whole step before
the request is scheduled. A step that needs an adapter waits for its fusion and for the one already running.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

import torch

Fused = TypeVar("Fused")

MAX_PREFETCHED = 32  # maximum number of queued, running and finished fusions; further requests start as space frees
MAX_ATTEMPTS = 2  # at a fusion; then the requests that wait for it end with an error
log = logging.getLogger("vllm.mta")


def _compute_with(threads: int) -> None:
    torch._C.set_num_threads(threads)  # vLLM's workers replace `torch.set_num_threads` by one that does nothing
    torch.get_num_threads()  # a thread that has asked keeps its number when another thread sets its own


class FusionPrefetcher(Generic[Fused]):
    """Queued, running and finished fusions that no step has used yet; one thread fuses each recipe once."""

    def __init__(self, fuse: Callable[[str], Fused]) -> None:
        self._fuse = fuse
        self._lock = Lock()
        self._futures: dict[str, Future[Fused]] = {}  # by recipe name, in the order of fusion
        threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(1, "mta-fuse", _compute_with, (1,))
        self._pool.submit(int).result()  # start the thread now, before its creator is bound to one core
        _compute_with(threads)  # the thread's setting also applies to threads that start later

    def start(self, name: str, needed: Callable[[], bool] = lambda: True) -> None:
        """Queue a recipe if it is new, there is space, and `needed` (called under the lock) returns true."""
        with self._lock:
            if name not in self._futures and len(self._futures) < MAX_PREFETCHED and needed():
                self._queue(name)

    def unfinished(self, names: Iterable[str]) -> set[str]:
        """Queue recipes in this order, as space allows, and return those that are not fused yet."""
        with self._lock:
            wanted = list(dict.fromkeys(names))
            self._queue_all(wanted[:MAX_PREFETCHED])
            return {name for name in wanted if name not in self._futures or not self._futures[name].done()}

    def prioritise(self, names: Iterable[str]) -> None:
        """Fuse these recipes next, in this order."""
        with self._lock:
            first = list(dict.fromkeys(names))
            self._queue_all(first)
            self._futures = {name: self._futures[name] for name in first} | self._futures

    def wait(self, name: str) -> Future[Fused]:
        """Prioritise a recipe, and return its fusion when it has ended; who takes the adapter then calls `discard`.

        The fusing thread runs even a fusion that has not started. On a machine with busy cores, the caller's several
        threads would take many times as long.
        """
        self.prioritise([name])
        fusion = self._futures[name]
        fusion.exception()
        return fusion

    def take_failed(self, names: Iterable[str]) -> set[str]:
        """Return the recipes whose fusion failed, and forget that it did: later requests try again."""
        with self._lock:
            failed = {name for name in names if name in self._futures and _has_failed(self._futures[name])}
            self._futures = {name: fusion for name, fusion in self._futures.items() if name not in failed}
        return failed

    def discard(self, name: str) -> None:
        with self._lock:
            self._futures.pop(name, None)

    def cancel(self, names: Iterable[str]) -> None:
        """Cancel or drop these fusions; wait for the running one."""
        with self._lock:
            futures = [self._futures.pop(name) for name in names if name in self._futures]
        for future in futures:
            if not future.cancel():
                future.exception()

    @property
    def names(self) -> list[str]:
        """Names of the recipes whose fusion is queued, running or finished without an error."""
        with self._lock:
            futures = list(self._futures.items())
        return [name for name, future in futures if not _has_failed(future)]

    def _queue_all(self, names: Sequence[str]) -> None:
        """Queue new recipes; evict the oldest others when full."""
        others = [name for name in self._futures if name not in names]
        for name in names:
            if name not in self._futures:
                if len(self._futures) >= MAX_PREFETCHED and others:
                    self._futures.pop(others.pop(0)).cancel()
                self._queue(name)

    def _queue(self, name: str) -> None:
        self._futures[name] = Future()
        self._pool.submit(self._fuse_next)

    def _fuse_next(self) -> None:
        """Fuse the first queued recipe, if any; runs once per queued recipe."""
        with self._lock:
            queued = (item for item in self._futures.items() if not (item[1].running() or item[1].done()))
            name, future = next(queued, ("", None))
            if future is None:
                return
            future.set_running_or_notify_cancel()
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                future.set_result(self._fuse(name))
                return
            except BaseException as error:
                log.exception("the fusion of %s failed, attempt %d", name.partition(":u-")[0], attempt)
                if attempt == MAX_ATTEMPTS:
                    future.set_exception(error)


def _has_failed(future: Future[Fused]) -> bool:
    return future.done() and future.exception() is not None
