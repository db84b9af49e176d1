"""What the model is asked for a user: the conversation as it came, with past items before its last turn."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from bank.profile import Item
from bank.prompt import chat_messages
from bank.retrieval import with_history
from bank.tasks import Task
from server.profiles import Profiles
from server.schemas import GenerateRequest, Personalize
from server.store.profiles import StoredItem


class Recall:
    """Puts a user's history into their prompts.

    Args:
        profiles: where it is.
        task: renders it.
    """

    def __init__(self, profiles: Profiles, task: Task) -> None:
        self._profiles = profiles
        self._task = task

    async def messages(self, request: GenerateRequest) -> list[dict[str, str]]:
        """The conversation for the engine.

        Raises:
            Unavailable: when a history is wanted and the store is down.
        """
        messages = conversation(request)
        if not request.history or request.personalize is Personalize.NONE or messages[-1]["role"] != "user":
            return messages
        stored = await self._profiles.items(request.user_id)
        turn = await asyncio.to_thread(self._turn, messages[-1]["content"], stored, request.history)
        return [*messages[:-1], *chat_messages(turn)]

    def _turn(self, turn: str, stored: Mapping[str, StoredItem], count: int) -> str:
        items: Sequence[Item] = [Item(name, item.fields) for name, item in stored.items()]
        return with_history(self._task, turn, items, count)


def conversation(request: GenerateRequest) -> list[dict[str, str]]:
    """The conversation as it came."""
    if request.prompt is not None:
        return chat_messages(request.prompt)
    return [message.model_dump() for message in request.messages or ()]
