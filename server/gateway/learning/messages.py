"""Learning from messages: what a person writes to a model becomes an item of their history, after the answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

import orjson

from bank.errors import ProfileError
from bank.items.own_words import own_words
from bank.items.profile import Item, parse_item
from bank.items.tasks import Task
from server.gateway.access.shares import Shares
from server.gateway.engines.chat import Conversation
from server.gateway.users.profiles import ProfileUpdate
from server.settings import MAX_ITEM_BYTES
from server.store.profiles import MARK_S

log = logging.getLogger("mta.gateway")

MAX_PENDING = 1000  # messages of a gateway that wait to be stored
MAX_AGE_S = MARK_S - 60  # later on the mark of an unknown user could be gone
CLOSE_S = 10.0  # longest time to store pending messages at shutdown


def item_of(messages: Conversation, task: Task) -> Item | None:
    """Return the item that the last message makes if the user wrote it, with the assistant's message before as input.

    Its id is the hash of its content, since apps send a conversation again at every turn.
    """
    *before, last = messages
    text = last.get("content") or ""
    if last["role"] != "user" or len(text) > MAX_ITEM_BYTES or not (words := own_words(text)):
        return None
    asked = before[-1].get("content") if before and before[-1]["role"] == "assistant" else None
    answers = asked and not task.drafted
    for raw in ({"input": asked, "output": words} if answers else {}, {"text": words}):
        with suppress(ProfileError):
            item = parse_item(raw, task, 0)
            if len(orjson.dumps(dict(item.fields))) <= MAX_ITEM_BYTES:
                return item
    return None


@dataclass
class MessageLearner:
    """Stores messages in the background, those of a tenant one after the other; requests have been answered by then."""

    learned: Callable[[int], None]  # called with the number of new items
    dropped: Callable[[str], None]  # called with the reason for each message that is not stored
    _places: Shares = field(default_factory=lambda: Shares(lambda: MAX_PENDING))  # of tenants
    _lines: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))  # by tenant
    _storing: set[asyncio.Task[None]] = field(default_factory=set)

    def has_room(self, tenant: str) -> bool:
        """Return whether a message may be accepted; one that was accepted is never refused by `learn`."""
        return self._places.may_acquire(tenant)

    def learn(self, tenant: str, learn: Callable[[], Awaitable[ProfileUpdate]], asked_s: float) -> None:
        """Store an item by `learn`, from a request that arrived at `asked_s`, by the performance counter."""
        self._places.acquire(tenant)
        task = asyncio.create_task(self._store(tenant, learn, asked_s))
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)

    async def _store(self, tenant: str, learn: Callable[[], Awaitable[ProfileUpdate]], asked_s: float) -> None:
        """Wait for the tenant's earlier messages, then store this one, or count why it is not stored."""
        dropped = "stopped"
        try:
            async with self._lines[tenant]:
                if time.perf_counter() - asked_s <= MAX_AGE_S:
                    update = await learn()
                    self.learned(update.changed)
                    dropped = ""
                else:
                    dropped = "late"
        except Exception as error:  # most often the user was erased, a quota is used up, or the store is away
            dropped = getattr(error, "code", "failed")
            log.warning("a message was not learnt: %s", getattr(error, "explained", repr(error)))
        finally:
            self._places.release(tenant)
            if dropped:
                self.dropped(dropped)

    async def finish(self, timeout_s: float = CLOSE_S) -> None:
        """Wait until all pending messages are stored, and drop those that are not in time."""
        if self._storing and (pending := (await asyncio.wait(self._storing, timeout=timeout_s))[1]):
            log.warning("%d messages were not learnt: the gateway stops", len(pending))
            for task in pending:
                task.cancel()
