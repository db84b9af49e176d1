"""Training on a thread while its lease is held."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

from adapters.errors import TrainingError
from adapters.training.user_trainer import Judgement, Training
from server.worker.leased.curves import Told
from server.worker.leased.lease import RENEW_S, HeldLease
from server.worker.leased.stall import Pulse


async def train_holding(held: HeldLease, most_s: float, train: Callable[[], Training]) -> Judgement:
    """Train; when the lease is lost or the time is up, training ends at its next sign of life, and so does this.

    Whoever cancels this does not wait for that: a step may take longer than a process that is stopped has left to hand
    its job back. The thread still has the model until then; nothing may use it after that, and nothing does, since the
    process ends.

    Args:
        held: the lease, renewed meanwhile.
        most_s: the longest it may take.
        train: prepares the training; called and iterated over on the thread.

    Raises:
        TrainingError: when it takes longer, or `train` raises it.
        LeaseLost: when the store says so.
        StoreSilent: when the lease ran out while the store was silent.
        Stalled: when the thread gives no sign of life: it can only be ended with this process.
    """
    lost, pulse, told = threading.Event(), Pulse(), Told()
    end_s = time.monotonic() + most_s

    def trained() -> Judgement | None:
        run = train()
        for latest in run:
            told.take(latest)
            pulse.beat()
            if lost.is_set():
                break
            if time.monotonic() > end_s:
                raise TrainingError(
                    f"training ran over its limit of {most_s:g} s, at step {latest.step} of {latest.of}: "
                    "send fewer or shorter samples, or ask for fewer steps"
                )
        return run.judgement

    async def done() -> bool:
        await asyncio.wait({training}, timeout=RENEW_S)
        if not training.done():
            pulse.check(str(held.lease.job.id))
        return training.done()

    training = asyncio.create_task(asyncio.to_thread(trained))
    try:
        while not await done():
            await held.renew(told.latest, told.curve)
        await held.renew(told.latest, told.curve)
        judgement = training.result()
        assert judgement is not None, "training is left early only once the lease is lost"
        return judgement
    except asyncio.CancelledError:
        training.cancel()  # the thread goes on to its next sign of life, and what comes of it is dropped
        raise
    finally:
        lost.set()
        while not await done():
            pass
        await asyncio.gather(training, return_exceptions=True)
