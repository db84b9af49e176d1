"""Fair scheduling while adapters are being fused, or when more recipes wait than there are slots.

A step waits for the fusions of all its requests, so a request is held back until its adapter is fused, if another one
can run. A request whose fusion keeps failing ends with an error: within a step, such a failure would end the engine.

vLLM admits requests with a slot ahead of requests without one, for as long as such requests arrive. If a request waits
too long, a slot is therefore drained: that of the recipe with the fewest running requests.
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
from server.engine.shared_part import without_common_slots

if TYPE_CHECKING:
    from server.engine.cpu.manager import CpuLoRAManager

PATIENCE_S = 2.0  # maximum time that requests with a slot may be admitted ahead of a waiting request without one
DRAIN_DIVISOR = 4  # at most one slot in 4 is drained at a time, so that the batch stays nearly full


class FairScheduler(Scheduler):  # type: ignore[misc]
    """vLLM's scheduler, but steps do not wait for fusions, and no request is passed over indefinitely."""

    adapter_manager: CpuLoRAManager | None = None  # None if nothing is fused ahead, or before the first request

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        patches.check(patches.CORE)
        super().__init__(*args, **kwargs)
        self.lora_config: Any = without_common_slots(self.vllm_config.lora_config)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        held = self._held_back() if self.waiting else set()
        if not held:
            return super().schedule(*args, **kwargs)
        order = list(self.waiting)
        self.waiting.remove_requests(held)
        try:
            return super().schedule(*args, **kwargs)
        finally:
            left, before = set(self.waiting), set(order)
            kept = left | held
            preempted = [request for request in self.waiting if request not in before]
            self.waiting.remove_requests(left)
            for request in [*preempted, *(request for request in order if request in kept)]:
                self.waiting.add_request(request)

    def _held_back(self) -> set[Request]:
        held = held_back(self.waiting, self.running, self.lora_config.max_loras, time.time())
        if self.adapter_manager is None:
            return held
        ending: set[str] = self.grammar_compile_error_reqs  # vLLM ends these requests with an error after the step
        waiting = [request for request in self.waiting if request.request_id not in ending]
        adapters = [request.lora_request for request in waiting if request.lora_request]
        unfused = self.adapter_manager.unfused(adapters)
        if not self.running and waiting and all(_adapter_id(request) in unfused for request in waiting):
            self.adapter_manager.wait_for(adapters[0])  # nothing else can run
            unfused.discard(adapters[0].lora_int_id)
        failed = self.adapter_manager.failed(adapters)
        ending |= {request.request_id for request in waiting if _adapter_id(request) in failed}
        return held | {each for each in self.waiting if _adapter_id(each) in unfused or each.request_id in ending}


class FairAsyncScheduler(FairScheduler, AsyncScheduler):  # type: ignore[misc]
    """Fair scheduler that schedules a step while the previous one runs, as on GPUs."""


def _adapter_id(request: Request) -> int:
    return request.lora_request.lora_int_id if request.lora_request else 0


def held_back(waiting: Iterable[Request], running: Iterable[Request], slots: int, now: float) -> set[Request]:
    """Return the waiting requests that must not be admitted yet, so that an overdue request gets a slot.

    `waiting` is in queue order, `slots` the maximum number of recipes per batch, `now` on the clock of `arrival_time`.
    """
    load = Counter(request.lora_request.lora_int_id for request in running if request.lora_request)
    if len(load) < slots:
        return set()
    overdue: set[int] = set()
    behind: list[Request] = []
    for request in waiting:
        if request.lora_request is None:
            continue
        recipe = request.lora_request.lora_int_id
        if recipe not in load and now - request.arrival_time > PATIENCE_S:
            overdue.add(recipe)
        elif recipe in load and overdue:
            behind.append(request)
    count = min(len(overdue), max(1, slots // DRAIN_DIVISOR))
    drained = {recipe for recipe, _ in sorted(load.items(), key=lambda item: (item[1], item[0]))[:count]}
    return {request for request in behind if request.lora_request.lora_int_id in drained}
