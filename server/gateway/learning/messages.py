"""Learning from messages: what a person writes to a model becomes an item of their history, after the answer."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import orjson

from bank.errors import ProfileError
from bank.items.profile import Item, parse_item
from bank.items.tasks import Task
from server.errors import QuotaExceeded, UserErased
from server.gateway.access.shares import Shares
from server.gateway.engines.chat import Conversation
from server.gateway.users.profiles import Profiles
from server.settings import MAX_ITEM_BYTES
from server.store.profiles import MARK_S
from server.store.tenants.user_key import User

MAX_PENDING = 1000  # messages of a gateway that wait to be stored
MAX_AGE_S = MARK_S - 60  # later on the mark of an unknown user could be gone
MIN_LETTERS = 16  # a shorter message says nothing about its writer
CLOSE_S = 10.0  # longest time to store pending messages at shutdown
_FENCED = re.compile(r"```.*?(```|\Z)", re.DOTALL)
_QUOTED = re.compile(r"^[ \t]*>.*$", re.MULTILINE)
_TAG = re.compile(r"<(/?)([A-Za-z][\w-]*+)[^<>]*+>")
_CODE_LINE = re.compile(
    r"[;{}]\s*$|^\s*(def|class|import|from|return|#include|function|const|let|var|SELECT)\b|[=<>]{2}|\w\("
)
_CODE_SHARE = 0.5  # share of code lines above which a message is code


def own_words(text: str) -> str:
    """Return what a person wrote in a message, without code blocks and quotes; empty if that is short or code.

    A message with a pair of tags is markup, or an app has put its own prompt around the words, for example with the
    content of a file: nothing of it is learnt.
    """
    words = _QUOTED.sub("", _FENCED.sub("", text)).strip()
    tags = {(mark, name.lower()) for mark, name in _TAG.findall(words)}
    if any(("", name) in tags for mark, name in tags if mark):
        return ""
    lines = [line for line in words.splitlines() if line.strip()]
    is_code = sum(bool(_CODE_LINE.search(line)) for line in lines) > _CODE_SHARE * len(lines)
    return "" if is_code or sum(map(str.isalpha, words)) < MIN_LETTERS else words


def item_of(messages: Conversation, task: Task) -> Item | None:
    """Return the item that the last message makes if the user wrote it, with the assistant's message before as input.

    Its id is the hash of its content, since apps send a conversation again at every turn.
    """
    *before, last = messages
    text = last.get("content") or ""
    if last["role"] != "user" or len(text) > MAX_ITEM_BYTES or not (words := own_words(text)):
        return None
    asked = before[-1].get("content") if before and before[-1]["role"] == "assistant" else None
    for raw in ({"input": asked, "output": words} if asked else {}, {"text": words}):
        with suppress(ProfileError):
            item = parse_item(raw, task, 0)
            if len(orjson.dumps(dict(item.fields))) <= MAX_ITEM_BYTES:
                return item
    return None


@dataclass(frozen=True, slots=True)
class LearntMessage:
    """An item of a user's own words, from a request of this epoch."""

    user: User
    item: Item
    epoch: str
    asked_s: float  # when the request arrived, by the performance counter


@dataclass
class MessageLearner:
    """Stores messages in the background, one at a time; the request has been answered by then."""

    learned: Callable[[int], None]  # called with the number of new items
    _pending: asyncio.Queue[tuple[Profiles, LearntMessage]] = field(default_factory=asyncio.Queue)
    _places: Shares = field(default_factory=lambda: Shares(lambda: MAX_PENDING))  # of tenants

    def has_room(self, tenant: str) -> bool:
        return self._places.may_acquire(tenant)

    def learn(self, profiles: Profiles, message: LearntMessage) -> None:
        if self.has_room(message.user.tenant):
            self._places.acquire(message.user.tenant)
            self._pending.put_nowait((profiles, message))

    async def store_next(self) -> None:
        """Wait for a message and store it, unless its user was erased, it is too old, or a quota is used up."""
        profiles, message = await self._pending.get()
        try:
            if time.perf_counter() - message.asked_s <= MAX_AGE_S:
                update = await profiles.learn(message.user, message.item, message.epoch)
                self.learned(update.changed)
        except (UserErased, QuotaExceeded):
            pass
        finally:
            self._places.release(message.user.tenant)
            self._pending.task_done()

    async def finish(self) -> None:
        """Wait until all pending messages are stored, for at most `CLOSE_S`."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._pending.join(), CLOSE_S)
