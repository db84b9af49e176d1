"""The order of a signature's steps, without a model and a store."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

from server.worker.loops import SigningLoop


async def test_a_try_is_counted_once_the_model_is_free_and_who_changed_meanwhile_is_requested_again() -> None:
    """Whoever waits for the model is taken again by other workers, which must not count."""
    lock, steps = asyncio.Lock(), list[str]()

    def step(name: str, answer: object = None) -> Any:
        async def called(*_: object) -> object:
            steps.append(f"{name}, {'busy' if lock.locked() else 'free'}")
            return answer

        return called

    changed = SimpleNamespace(is_signed=lambda bank: False)
    queue: Any = SimpleNamespace(
        take=step("take", "key"), count_attempt=step("count_attempt", 1), remove=step("remove"), add=step("add")
    )
    profiles: Any = SimpleNamespace(read=step("read", SimpleNamespace(profile=None)), load=step("load", changed))
    bank: Any = SimpleNamespace(manifest=SimpleNamespace(short="9f2c41d0"))
    assert await SigningLoop(queue, profiles, bank, None, lock).work_once(0)
    assert steps == ["take, free", "count_attempt, busy", "read, busy", "remove, free", "load, free", "add, free"]
