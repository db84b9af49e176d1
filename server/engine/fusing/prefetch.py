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
MAX_FAILURES = 2  # attempts at a fusion; then the requests that wait for it end with an error
log = logging.getLogger("mta.engine")


class _Fusion(Future[Fused]):
    failures: int = 0  # of the recipe's attempts so far, this one included

    @property
    def failed(self) -> bool:
        return self.done() and self.exception() is not None


def _compute_with(threads: int) -> None:
    """Set the number of threads that compute what this one asks for."""
    torch._C.set_num_threads(threads)  # vLLM's workers replace `torch.set_num_threads` by one that does nothing
    torch.get_num_threads()  # a thread that has asked keeps its number when another thread sets its own


class FusionPrefetcher(Generic[Fused]):
    """Queued, running and finished fusions that no step has used yet; one thread fuses each recipe once."""

    def __init__(self, fuse: Callable[[str], Fused]) -> None:
        self._fuse = fuse
        self._lock = Lock()
        self._futures: dict[str, _Fusion[Fused]] = {}  # by recipe name, in the order of fusion
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
        """Prioritise a recipe, and wait until it is fused or has failed `MAX_FAILURES` times.

        The fusing thread runs even a fusion that has not started. On a machine with busy cores, the caller's several
        threads would take many times as long.
        """
        while True:
            self.prioritise([name])
            fusion = self._futures[name]
            if fusion.exception() is None or fusion.failures >= MAX_FAILURES:
                return fusion

    def result(self, name: str) -> Fused:
        """Return the adapter as soon as it is fused; the caller then calls `discard`."""
        return self.wait(name).result()

    def failed(self, names: Iterable[str]) -> set[str]:
        """Forget and return the recipes that failed `MAX_FAILURES` times; for a later request they are new."""
        with self._lock:
            failed = {name for name in names if name in self._futures and self._futures[name].failures >= MAX_FAILURES}
            self._futures = {name: fusion for name, fusion in self._futures.items() if name not in failed}
        return failed

    def discard(self, name: str) -> None:
        """Drop the result; the manager now holds the adapter."""
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
        return [name for name, future in futures if not future.failed]

    def _queue_all(self, names: Sequence[str]) -> None:
        """Queue new recipes, and failed ones again; evict the oldest others when full."""
        others = [name for name in self._futures if name not in names]
        for name in names:
            future = self._futures.get(name)
            if future is None or (future.failed and future.failures < MAX_FAILURES):
                if len(self._futures) >= MAX_PREFETCHED and others:
                    self._futures.pop(others.pop(0)).cancel()
                self._queue(name)

    def _queue(self, name: str) -> None:
        fusion, before = _Fusion[Fused](), self._futures.get(name)
        fusion.failures = before.failures if before else 0
        self._futures[name] = fusion
        self._pool.submit(self._fuse_next)

    def _fuse_next(self) -> None:
        """Fuse the first queued recipe, if any; runs once per queued recipe."""
        with self._lock:
            queued = (item for item in self._futures.items() if not (item[1].running() or item[1].done()))
            name, future = next(queued, ("", None))
            if future is None:
                return
            future.set_running_or_notify_cancel()
        try:
            future.set_result(self._fuse(name))
        except BaseException as error:
            log.exception("the fusion of %s failed", name.partition(":u-")[0])
            future.failures += 1
            future.set_exception(error)
