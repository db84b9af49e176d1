"""Whose turn it is when adapters are still being fused, or when more recipes wait than there are slots.

A step waits for the fusions of all its requests, so one is left out until its adapter is fused, if anything else can
run. vLLM admits requests whose recipes have slots past one whose recipe has none, for as long as such requests come: so
for one that has waited too long a slot is drained, that of the recipe with the fewest running requests.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from server.engine import patches

if TYPE_CHECKING:
    from server.engine.fusing.manager import FusingLoRAManager

PATIENCE_S = 2.0
"""How long others may be admitted before a request because their recipes have slots and its own has none."""

DRAINED = 4  # one slot in so many is drained at a time, so that the batch stays nearly full


class _Turns(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, without steps that wait for a fusion, and with an end to being passed over."""

    fuser: FusingLoRAManager | None = None  # None where another process fuses, or before any request has come

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        patches.check(patches.CORE)
        super().__init__(*args, **kwargs)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """One step's schedule, made without those who have to stand back."""
        back = self._back() if self.waiting else set()
        if not back:
            return super().schedule(*args, **kwargs)
        order = list(self.waiting)
        self.waiting.remove_requests(back)
        try:
            return super().schedule(*args, **kwargs)
        finally:
            left, before = set(self.waiting), set(order)
            kept = left | back
            preempted = [request for request in self.waiting if request not in before]
            self.waiting.remove_requests(left)
            for request in [*preempted, *(request for request in order if request in kept)]:
                self.waiting.add_request(request)

    def _back(self) -> set[Request]:
        back = held_back(self.waiting, self.running, self.lora_config.max_loras, time.time())
        if self.fuser is None:
            return back
        personal = [request for request in self.waiting if request.lora_request]
        unfused = self.fuser.unfused([request.lora_request for request in personal])
        if not self.running and all(_recipe(request) in unfused for request in self.waiting):
            unfused.discard(_recipe(next(iter(self.waiting))))  # nothing else can run: the step waits for the first
        return back | {request for request in personal if _recipe(request) in unfused}


class FairScheduler(_Turns):
    """Where steps are scheduled one after the other, as on CPUs."""


class FairAsyncScheduler(_Turns, AsyncScheduler):  # type: ignore[misc]
    """Where a step is scheduled while the one before it runs, as on GPUs."""


def _recipe(request: Request) -> int:
    """The id of a request's adapter; 0 for none."""
    return request.lora_request.lora_int_id if request.lora_request else 0


def held_back(waiting: Iterable[Request], running: Iterable[Request], slots: int, now: float) -> set[Request]:
    """The waiting requests, in order, that must not be admitted yet, so that one that waits too long gets a slot.

    `slots` is how many recipes the batch can have, `now` on the arrivals' clock.
    """
    load = Counter(request.lora_request.lora_int_id for request in running if request.lora_request)
    if len(load) < slots:
        return set()
    impatient: set[int] = set()
    behind: list[Request] = []
    for request in waiting:
        if request.lora_request is None:
            continue
        recipe = request.lora_request.lora_int_id
        if recipe not in load and now - request.arrival_time > PATIENCE_S:
            impatient.add(recipe)
        elif recipe in load and impatient:
            behind.append(request)
    most = min(len(impatient), max(1, slots // DRAINED))
    drained = {recipe for recipe, _ in sorted(load.items(), key=lambda item: (item[1], item[0]))[:most]}
    return {request for request in behind if request.lora_request.lora_int_id in drained}
