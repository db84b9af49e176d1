"""The processes that build one bank together: each computes some of the pieces, and all get every result, in order.

They are the ranks of `torchrun`, on one machine or several; without it, `mta bank build` starts them on this machine. A
piece depends on its inputs alone, so any number of ranks builds the same bank.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.synchronize import Semaphore
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
import torch.distributed as group

from adapters.errors import MtaError
from bank.errors import BankError

_LONGEST_PIECE = timedelta(days=7)
REFUSED_S = 10.0  # time that rank 0 has to join after another rank has met a refusal
Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Ranks:
    """This process as one of the ranks; rank 0 writes the bank and shows progress."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    def first(self, make: Callable[[], Result]) -> Result:
        """Compute something on rank 0, and return it on all ranks."""
        return next(self.each([None], lambda _: make()))

    def each(self, pieces: Sequence[Piece], make: Callable[[Piece], Result]) -> Iterator[Result]:
        """Compute every piece on one of the ranks; yield all results in order, or raise an `MtaError`, on all ranks."""
        for start in range(0, len(pieces), self.count):
            at_once = pieces[start : start + self.count]
            result: Result | MtaError | None = None
            if self.rank < len(at_once):
                try:
                    result = make(at_once[self.rank])
                except MtaError as error:
                    result = error
            results = [result] * self.count
            if self.count > 1:
                group.all_gather_object(results, result)
            for outcome in results[: len(at_once)]:
                if isinstance(outcome, MtaError):
                    raise outcome
                yield outcome  # type: ignore[misc]  # only ranks without a piece have no result


@contextmanager
def joined(count: int, run: Callable[[Ranks], object]) -> Iterator[Ranks]:
    """Join the ranks of `torchrun`, or start `count - 1` more processes, which call `run` as the others."""
    threads = torch.get_num_threads()
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # two ranks train half again as fast as two threads
    try:
        if "TORCHELASTIC_RUN_ID" in os.environ:
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            with _member("env://", int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])) as ranks:
                yield ranks
        elif count == 1:
            yield Ranks()
        else:
            with TemporaryDirectory() as folder, _helpers(f"file://{folder}/ranks", count, run) as ranks:
                yield ranks
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _helpers(meeting: str, count: int, run: Callable[[Ranks], object]) -> Iterator[Ranks]:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker:UserWarning")  # after Ctrl-C, of unused locks
    spawn = multiprocessing.get_context("spawn")
    here = spawn.Semaphore(0)
    others = [spawn.Process(target=_help, args=(here, meeting, n, count, run), daemon=True) for n in range(1, count)]
    for other in others:
        other.start()
    try:
        for _ in others:  # joining blocks, even on Ctrl-C, until all do
            while not here.acquire(timeout=1):
                if any(other.exitcode for other in others):
                    raise RuntimeError("it never joined")
        with _member(meeting, 0, count) as ranks:
            yield ranks
    except RuntimeError as error:
        ended = [f"{other.exitcode}" for other in others if other.exitcode]
        raise BankError(
            f"a process of the build ended with status {', '.join(ended) or 'unknown'} ({error}): run the same command "
            "again to continue, with fewer --ranks if memory was short"
        ) from error
    finally:
        for other in others:
            other.terminate()
            other.join()


def _help(here: Semaphore, meeting: str, rank: int, count: int, run: Callable[[Ranks], object]) -> None:
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))  # Ctrl-C reaches every process; rank 0 reports it
    torch.set_num_threads(1)
    here.release()
    with _member(meeting, rank, count) as ranks:
        try:
            run(ranks)
        except MtaError:
            time.sleep(REFUSED_S)  # rank 0 has it too, and ends this process once it has joined


@contextmanager
def _member(meeting: str, rank: int, count: int) -> Iterator[Ranks]:
    group.init_process_group("gloo", init_method=meeting, rank=rank, world_size=count, timeout=_LONGEST_PIECE)
    try:
        yield Ranks(rank, count)
    finally:
        group.destroy_process_group()
