"""Build a user's prompt: the conversation as sent, with past items before its last turn."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bank.items.profile import Item
from bank.items.prompt import chat_messages
from bank.items.retrieval import JOIN, ItemIndex, turn_with_memories
from bank.items.tasks import Task
from server.gateway.access.shares import FairQueue, Shares
from server.gateway.engines.admin import Engines
from server.gateway.engines.chat import Conversation
from server.gateway.generation.request import GenerationRequest, LengthLimits, chars_of, max_prompt_tokens, size_bytes
from server.store.profile_record import Profile, StoredItem
from server.store.tenants.user_key import User

INDEX_CACHE_BYTES = 64 << 20  # for all banks of a gateway
INDEX_TTL_S = 300.0  # seconds a history index stays in memory after its last use
MAX_QUEUED_BUILDS = 16  # per caller
_ANSWER_MARK_TOKENS = 64  # upper bound on what a chat template adds before the answer; the engine's count omits it
_MIN_TOKENS_PER_BYTE = 1 / 8  # assumed minimum; a text with fewer tokens gets fewer items than would fit
HISTORY_LATE = "the user's past items could not be read in time, because others were queued first: retry soon"
_NOT_KEPT = "the user's texts are not kept (MTA_KEEP_TEXTS), so none can be quoted"
_NOTHING_QUOTED = "none of the user's items has the fields that prompts quote"

Version = tuple[int, int, bytes]


@dataclass(frozen=True, slots=True)
class UserPrompt:
    """The conversation for the model, with `items` past items in it."""

    messages: Conversation
    items: int
    reason: str | None  # why requested past items are missing
    patience_s: float | None  # seconds the request may still wait; None for the default


@dataclass(frozen=True, slots=True, eq=False)
class PromptBuilder:
    """Adds users' histories to prompts; a request waits for a history at most half its patience."""

    task: Task
    engines: Engines
    histories: HistoryIndexer
    patience_s: float  # maximum wait; a request may set a shorter one

    async def build(
        self, request: GenerationRequest, user: User | None, profile: Profile | None, limits: LengthLimits
    ) -> UserPrompt:
        """Return the conversation for the engine, with as much of the requested history as certainly fits.

        Add no history while the context length is unknown.
        """
        messages, patience_s, room = request.messages, request.patience_s, limits.room_tokens(request)
        needs_history = request.history and messages[-1]["role"] == "user"
        if not needs_history or user is None or profile is None or room is None:
            return UserPrompt(messages, 0, None, patience_s)
        if not profile.keeps_texts:
            return UserPrompt(messages, 0, _NOT_KEPT, patience_s)
        patience_s = self.patience_s if patience_s is None else min(patience_s, self.patience_s)
        index, waited_s = await self.histories.index(user, profile, request.caller.name, patience_s / 2)
        patience_s = max(0.0, patience_s - waited_s)
        if index is None:
            return UserPrompt(messages, 0, HISTORY_LATE, patience_s)
        memories = await asyncio.to_thread(index.memories, messages[-1]["content"], request.history)
        reason = None if memories else _NOTHING_QUOTED
        template = request.sampling.get("chat_template_kwargs", {})
        fitting = await self._fit(messages, memories, room, limits.max_prompt_chars, template)
        return UserPrompt(*fitting, reason, patience_s)

    async def _fit(
        self, messages: Conversation, memories: Sequence[str], room: int, max_chars: int, template: Mapping[str, Any]
    ) -> tuple[Conversation, int]:
        """Return the conversation with the most relevant memories that fit into `room` tokens, and their number.

        One token per byte is a safe bound but far above the usual count, so try more memories and let the engine count.
        """
        tokens_per_byte = _MIN_TOKENS_PER_BYTE
        while True:
            chosen = self._select(messages, memories, room / tokens_per_byte, max_chars)
            if not chosen:
                return messages, 0
            built = self._with_memories(messages, chosen)
            if max_prompt_tokens(built) <= room:
                return built, len(chosen)
            tokens = await self.engines.count_tokens(built, template)
            if tokens is None:
                tokens_per_byte = 1.0
            elif tokens + _ANSWER_MARK_TOKENS <= room:
                return built, len(chosen)
            else:
                tokens_per_byte = min(1.0, max(1.25 * tokens_per_byte, 1.05 * tokens / max_prompt_tokens(built)))

    def _select(self, messages: Conversation, memories: Sequence[str], room_bytes: float, max_chars: int) -> list[str]:
        frame = self._with_memories(messages, [""])
        room_bytes -= max_prompt_tokens(frame)
        room_chars = max_chars - chars_of(frame)
        chosen = []
        for memory in memories:
            memory_bytes, memory_chars = size_bytes(memory) + len(JOIN), len(memory) + len(JOIN)
            if memory_bytes <= room_bytes and memory_chars <= room_chars:
                chosen.append(memory)
                room_bytes, room_chars = room_bytes - memory_bytes, room_chars - memory_chars
        return chosen

    def _with_memories(self, messages: Conversation, memories: Sequence[str]) -> Conversation:
        turn = turn_with_memories(self.task, messages[-1]["content"], memories)
        return [*messages[:-1], *chat_messages(turn)]


@dataclass(frozen=True, slots=True)
class _CachedIndex:
    version: Version
    index: ItemIndex
    expiry: asyncio.TimerHandle


@dataclass
class IndexCache:
    """One index per user, evicted in least-recently-used order. Use it from one event loop."""

    max_bytes: int
    ttl_s: float = INDEX_TTL_S
    size_bytes: int = 0
    _cached: OrderedDict[str, _CachedIndex] = field(default_factory=OrderedDict)

    def get(self, user_key: str, version: Version) -> ItemIndex | None:
        """Return the index of this version of a user's history; drop an index of another version."""
        cached = self.drop(user_key)
        if cached is None or cached.version != version:
            return None
        self.put(user_key, version, cached.index)
        return cached.index

    def put(self, user_key: str, version: Version, index: ItemIndex) -> None:
        """Store an index, unless it alone exceeds `max_bytes`."""
        self.drop(user_key)
        if index.size_bytes > self.max_bytes:
            return
        expiry = asyncio.get_running_loop().call_later(self.ttl_s, self.drop, user_key)
        self._cached[user_key] = _CachedIndex(version, index, expiry)
        self.size_bytes += index.size_bytes
        while self.size_bytes > self.max_bytes:
            self.drop(next(iter(self._cached)))

    def drop(self, user_key: str) -> _CachedIndex | None:
        cached = self._cached.pop(user_key, None)
        if cached is not None:
            cached.expiry.cancel()
            self.size_bytes -= cached.index.size_bytes
        return cached


@dataclass(frozen=True, slots=True, eq=False)
class _Build:
    """A queued or running index build; `started` completes when the build leaves the queue."""

    caller: str
    started: asyncio.Future[None]
    task: asyncio.Task[ItemIndex]


@dataclass
class HistoryIndexer:
    """Indexes histories, whose items `read` returns. Use it from one event loop.

    Indexing blocks the event loop through the interpreter lock, up to a second for a long history. So only one build
    runs at a time, and callers take turns in bounded queues. A build stays queued after its requests have given up, so
    the index is ready for the user's next request.
    """

    read: Callable[[User], Awaitable[Mapping[str, StoredItem]]]
    task: Task
    cache: IndexCache
    _builds: dict[tuple[str, Version], _Build] = field(default_factory=dict)
    _queue: FairQueue = field(default_factory=lambda: FairQueue(Shares(lambda: 1)))

    async def index(
        self, user: User, profile: Profile, caller: str, patience_s: float
    ) -> tuple[ItemIndex | None, float]:
        """Return the index of a user's items and the seconds spent in the queue; None if the build did not start.

        `patience_s` is the longest wait in the caller's queue; once started, the build is awaited without a limit.
        """
        version = (profile.updated_ms, profile.items, profile.embedding.tobytes())
        if (cached := self.cache.get(user.key, version)) is not None:
            return cached, 0.0
        build = self._builds.get((user.key, version)) or self._queue_build(user, version, caller)
        if build is None:
            return None, 0.0
        start_s = time.monotonic()
        await asyncio.wait((build.started,), timeout=patience_s)
        waited_s = time.monotonic() - start_s
        return (await asyncio.shield(build.task) if build.started.done() else None), waited_s

    def _queue_build(self, user: User, version: Version, caller: str) -> _Build | None:
        queued = sum(build.caller == caller and not build.started.done() for build in self._builds.values())
        if queued >= MAX_QUEUED_BUILDS:
            return None
        started = asyncio.get_running_loop().create_future()
        task = asyncio.create_task(self._run_build(user, version, caller, started))
        task.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieved even without a waiter
        build = self._builds[user.key, version] = _Build(caller, started, task)
        return build

    async def _run_build(self, user: User, version: Version, caller: str, started: asyncio.Future[None]) -> ItemIndex:
        try:
            async with self._queue.held(caller):
                started.set_result(None)
                items = [Item(name, item.fields) for name, item in (await self.read(user)).items()]
                index = await asyncio.to_thread(ItemIndex, self.task, items)
            self.cache.put(user.key, version, index)
            return index
        finally:
            del self._builds[user.key, version]
