"""A lease by the worker's own clock: how long the store may be silent before a job is given up."""

from __future__ import annotations

import asyncio
import errno
import logging
import time
from collections.abc import Awaitable, Callable
from typing import ParamSpec, TypeGuard, TypeVar

from adapters.errors import TrainingError
from adapters.training.user_trainer import TrainingProgress
from server.errors import Unavailable
from server.store.jobs import JobStore, Lease
from server.store.samples import Curve

log = logging.getLogger("mta.worker")

LEASE_S = 15.0
RENEW_S = 1.0
ANSWER_S = 4.0
"""How long to wait for an answer before calling the store again: a lost answer must not use up the lease."""

P = ParamSpec("P")
T = TypeVar("T")


class LeaseLost(Exception):
    """The job has ended or is another worker's: this one's result is no longer wanted."""


class StoreSilent(Exception):
    """The store could not be used for as long as the lease was sure to last."""


async def retry_until_answered(call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """The store's answer to a repeatable call, however long it is away; Unavailable when what is stored is damaged."""

    def note(error: Unavailable | TimeoutError) -> None:
        if _is_damage(error):
            raise error
        log.warning("%s", _reason(error))

    return await _retry(note, call, *args, **kwargs)


class HeldLease:
    """A lease that this worker holds, for as long as it can be sure of it.

    The call that took it began at `since_s` by `time.monotonic`; the store counts from a later moment.
    """

    def __init__(self, jobs: JobStore, lease: Lease, since_s: float) -> None:
        self.lease = lease
        self._jobs = jobs
        self._until_s = since_s + LEASE_S
        self._written: Curve | None = None

    async def renew(self, progress: TrainingProgress, curve: Curve) -> None:
        """Extend it, and report how far training is; a curve is written only when it has changed.

        While the store is silent, it stays as it is, and once it has run out that is StoreSilent. LeaseLost when the
        store says so.
        """
        since_s = time.monotonic()
        loss = progress.loss if progress.step else None
        try:
            async with asyncio.timeout(ANSWER_S):
                held = await self._jobs.renew(
                    self.lease,
                    LEASE_S,
                    step=progress.step,
                    of=progress.of,
                    loss=loss,
                    curve=None if curve == self._written else curve,
                )
        except (Unavailable, TimeoutError) as error:
            _raise_what_is_ours(error)
            self._note(error)
            return
        if not held:
            raise LeaseLost
        self._until_s, self._written = since_s + LEASE_S, curve

    async def retry(self, call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
        """The store's answer to a repeatable call. Raises StoreSilent once the lease has run out without one, and
        TrainingError when the user's stored data is damaged."""
        return await _retry(self._note, call, *args, **kwargs)

    def _note(self, error: Unavailable | TimeoutError) -> None:
        if _is_damage(error):
            raise TrainingError(f"{error.message}: delete the user and send the profile again") from error
        if time.monotonic() >= self._until_s:
            raise StoreSilent(_reason(error)) from error
        log.warning("%s: %s", self.lease.job.id, _reason(error))


async def _retry(
    note: Callable[[Unavailable | TimeoutError], None],
    call: Callable[P, Awaitable[T]],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """The answer to a call, which is repeated until `note` raises."""
    while True:
        try:
            async with asyncio.timeout(ANSWER_S):
                return await call(*args, **kwargs)
        except (Unavailable, TimeoutError) as error:
            _raise_what_is_ours(error)
            note(error)
        await asyncio.sleep(RENEW_S)


def _raise_what_is_ours(error: BaseException) -> None:
    """A connection that fails for lack of memory or threads is not the store's fault."""
    cause = error.__cause__ or error.__context__
    while cause is not None:
        if isinstance(cause, MemoryError | RuntimeError) or getattr(cause, "errno", None) == errno.ENOMEM:
            raise RuntimeError(f"this process can no longer reach the store: {cause!r}") from error
        cause = cause.__cause__ or cause.__context__


def _is_damage(error: Unavailable | TimeoutError) -> TypeGuard[Unavailable]:
    return isinstance(error, Unavailable) and error.code == "store_corrupt"


def _reason(error: Unavailable | TimeoutError) -> str:
    return error.explained if isinstance(error, Unavailable) else f"the store gave no answer within {ANSWER_S:g} s"
