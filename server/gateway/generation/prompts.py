"""The prompt for a user: the conversation as sent, with past items before its last turn."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

from bank.items.profile import Item
from bank.items.prompt import chat_messages
from bank.items.retrieval import JOIN, ItemIndex, remembering
from bank.items.tasks import Task
from server.gateway.access.shares import FairQueue, Shares
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import Conversation
from server.gateway.generation.request import GenerationRequest, LengthLimits, chars_of, most_tokens, size_bytes
from server.store.profile_record import Profile, StoredItem
from server.store.tenants.user_key import User

KEPT_S = 300.0
"""How long a history stays in memory after its last use."""
MOST_WAITING = 16
"""Longest line of each caller."""
_ANSWER_MARK_TOKENS = 64
"""More than a chat template adds before the answer, which the engine's count leaves out."""
_FEWEST_TOKENS = 1 / 8
"""The fewest tokens per byte that a text is assumed to have; if one has fewer, it gets fewer items than would fit."""
_LEFT_OUT = "the user's past items could not be read in time, because others were ahead: they are ready in a moment"

Version = tuple[int, int, bytes]


@dataclass(frozen=True, slots=True)
class UserPrompt:
    """What the model is asked: the conversation, with so many past items in it."""

    messages: Conversation
    items: int
    reason: str | None  # why there are none although some were wanted, if time was too short
    patience_s: float | None  # how long the request may still wait; None for as long as is usual


@dataclass(frozen=True, slots=True, eq=False)
class PromptBuilder:
    """Puts users' histories into prompts; a request waits at most half its patience for one."""

    task: Task
    engines: Engines
    histories: HistoryIndexer
    patience_s: float  # of requests that do not have less

    async def build(self, request: GenerationRequest, profile: Profile | None, limits: LengthLimits) -> UserPrompt:
        """The conversation for the engine, with as much history as the request asks for and is sure to fit.

        While the context is unknown nothing is sure to fit.
        """
        messages, patience_s, room = request.messages, request.patience_s, limits.room(request)
        wanted = request.history and messages[-1]["role"] == "user"
        if not wanted or request.user is None or profile is None or room is None:
            return UserPrompt(messages, 0, None, patience_s)
        patience_s = self.patience_s if patience_s is None else min(patience_s, self.patience_s)
        index, waited_s = await self.histories.index(request.user, profile, request.caller.name, patience_s / 2)
        patience_s = max(0.0, patience_s - waited_s)
        if index is None:
            return UserPrompt(messages, 0, _LEFT_OUT, patience_s)
        memories = await asyncio.to_thread(index.memories, messages[-1]["content"], request.history)
        return UserPrompt(*await self._fitted(messages, memories, room, limits.prompt_chars), None, patience_s)

    async def _fitted(
        self, messages: Conversation, memories: Sequence[str], room: int, most_chars: int
    ) -> tuple[Conversation, int]:
        """The conversation with the most relevant memories that fit into `room` tokens.

        One token per byte is a safe bound, but far more than text takes; so more memories are tried, and the engine
        counts.
        """
        tokens_a_byte = _FEWEST_TOKENS
        while True:
            chosen = self._chosen(messages, memories, room / tokens_a_byte, most_chars)
            if not chosen:
                return messages, 0
            built = self._with(messages, chosen)
            if most_tokens(built) <= room:
                return built, len(chosen)
            tokens = await self.engines.count_tokens(built)
            if tokens is None:
                tokens_a_byte = 1.0
            elif tokens + _ANSWER_MARK_TOKENS <= room:
                return built, len(chosen)
            else:
                tokens_a_byte = min(1.0, max(1.25 * tokens_a_byte, 1.05 * tokens / most_tokens(built)))

    def _chosen(self, messages: Conversation, memories: Sequence[str], room_bytes: float, most_chars: int) -> list[str]:
        """The memories that fit, best first; one that does not fit makes way for the next."""
        frame = self._with(messages, [""])
        room_bytes -= most_tokens(frame)
        room_chars = most_chars - chars_of(frame)
        chosen = []
        for memory in memories:
            memory_bytes, memory_chars = size_bytes(memory) + len(JOIN), len(memory) + len(JOIN)
            if memory_bytes <= room_bytes and memory_chars <= room_chars:
                chosen.append(memory)
                room_bytes, room_chars = room_bytes - memory_bytes, room_chars - memory_chars
        return chosen

    def _with(self, messages: Conversation, memories: Sequence[str]) -> Conversation:
        turn = remembering(self.task, messages[-1]["content"], memories)
        return [*messages[:-1], *chat_messages(turn)]


@dataclass(frozen=True, slots=True)
class _Kept:
    version: Version
    index: ItemIndex
    expiry: asyncio.TimerHandle


class IndexCache:
    """One index per user; the least recently used go first. Belongs to one event loop."""

    def __init__(self, max_bytes: int, kept_s: float = KEPT_S) -> None:
        self.size_bytes = 0
        self._max_bytes = max_bytes
        self._kept_s = kept_s
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def get(self, user_key: str, version: Version) -> ItemIndex | None:
        """The index of this version of a user's history; one of any other version is dropped."""
        kept = self.drop(user_key)
        if kept is None or kept.version != version:
            return None
        self.put(user_key, version, kept.index)
        return kept.index

    def put(self, user_key: str, version: Version, index: ItemIndex) -> None:
        """Keep an index, unless it alone exceeds `max_bytes`."""
        self.drop(user_key)
        if index.size_bytes > self._max_bytes:
            return
        expiry = asyncio.get_running_loop().call_later(self._kept_s, self.drop, user_key)
        self._kept[user_key] = _Kept(version, index, expiry)
        self.size_bytes += index.size_bytes
        while self.size_bytes > self._max_bytes:
            self.drop(next(iter(self._kept)))

    def drop(self, user_key: str) -> _Kept | None:
        """Forget a user's index, if there is one."""
        kept = self._kept.pop(user_key, None)
        if kept is not None:
            kept.expiry.cancel()
            self.size_bytes -= kept.index.size_bytes
        return kept


@dataclass(frozen=True, slots=True, eq=False)
class _Build:
    """An index in the making; `begun` is done once its turn has come."""

    caller: str
    begun: asyncio.Future[None]
    task: asyncio.Task[ItemIndex]


class HistoryIndexer:
    """Indexes histories, whose items `read` reads. Belongs to one event loop.

    Indexing takes the interpreter from the event loop, up to a second for a long history. So one is made at a time,
    callers take turns in bounded lines, and a request that waits too long goes without. A build stays in the line when
    those who asked for it have left: it is ready for their next request.
    """

    def __init__(
        self, read: Callable[[User], Awaitable[Mapping[str, StoredItem]]], task: Task, cache: IndexCache
    ) -> None:
        self._read = read
        self._task = task
        self._cache = cache
        self._builds: dict[tuple[str, Version], _Build] = {}
        self._line = FairQueue(Shares(lambda: 1))

    async def index(
        self, user: User, profile: Profile, caller: str, patience_s: float
    ) -> tuple[ItemIndex | None, float]:
        """A user's items, ready to be searched, and how long their turn was waited for; None if it did not come.

        `patience_s` is the longest wait for the turn in the caller's line; what has begun is waited for to its end.
        """
        version = (profile.updated_ms, profile.items, profile.embedding.tobytes())
        if (kept := self._cache.get(user.key, version)) is not None:
            return kept, 0.0
        build = self._builds.get((user.key, version)) or self._begin(user, version, caller)
        if build is None:
            return None, 0.0
        start_s = time.monotonic()
        await asyncio.wait((build.begun,), timeout=patience_s)
        waited_s = time.monotonic() - start_s
        return (await asyncio.shield(build.task) if build.begun.done() else None), waited_s

    def _begin(self, user: User, version: Version, caller: str) -> _Build | None:
        """Join the caller's line, unless it is full."""
        if sum(build.caller == caller and not build.begun.done() for build in self._builds.values()) >= MOST_WAITING:
            return None
        begun = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._build(user, version, caller, begun))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # nobody may be left to be told
        build = self._builds[user.key, version] = _Build(caller, begun, task)
        return build

    async def _build(self, user: User, version: Version, caller: str, begun: asyncio.Future[None]) -> ItemIndex:
        try:
            async with self._line.held(caller):
                begun.set_result(None)
                items = [Item(name, item.fields) for name, item in (await self._read(user)).items()]
                index = await asyncio.to_thread(ItemIndex, self._task, items)
            self._cache.put(user.key, version, index)
            return index
        finally:
            del self._builds[user.key, version]
