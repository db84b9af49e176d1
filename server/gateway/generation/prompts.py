"""The prompt for a user: the conversation as sent, with past items before its last turn."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from bank.items.prompt import chat_messages
from bank.items.retrieval import JOIN, remembering
from bank.items.tasks import Task
from server.gateway.engines.admin import TokenizerClient
from server.gateway.engines.chat import Conversation
from server.gateway.generation.histories import HistoryIndexer
from server.gateway.generation.request import GenerationRequest, LengthLimits, chars_of, most_tokens, size_bytes
from server.store.profiles import Profile

_ANSWER_MARK_TOKENS = 64
"""More than a chat template adds before the answer, which the engine's count leaves out."""

_FEWEST_TOKENS = 1 / 8
"""The fewest tokens per byte that a text is assumed to have; if one has fewer, it gets fewer items than would fit."""

_LEFT_OUT = "the user's past items could not be read in time, because others were ahead: they are ready in a moment"


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
    tokenizer: TokenizerClient
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
            tokens = await self.tokenizer.count(built)
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
