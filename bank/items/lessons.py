"""What a person's adapters learn from: their items, a share of them with past items of the same person in the prompt.

A model that was never trained with past items in the prompt takes them for noise. They are found and rendered as in
serving (`bank/items/retrieval.py`); an item never sees itself, nor what came after it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from adapters.training.example import Example
from bank.items.histories import History
from bank.items.profile import Item, item_pair
from bank.items.prompt import ChatTokenizer, chat_messages, encode_conversation, encode_pair
from bank.items.retrieval import ItemIndex, remembering
from bank.items.tasks import PAST_COUNTS, Task


class Past:
    """A person's items, the oldest first, as the past of what is learnt from them.

    A `share` of the turns, 0 to 1, gets some of them; the seed decides which turns, and how many items.
    """

    def __init__(self, task: Task, items: Sequence[Item], share: float, seed: int) -> None:
        self.task = task
        self._items = items
        self._share = share
        self._seed = seed

    def memories(self, turn: str, output: str) -> list[str]:
        """The past items that stand before a turn, as prompts quote them, the best first; most often none or one.

        Where turn and output are an item's, only those before it are its past; else all of them are.
        """
        chance = random.Random(f"{self._seed}:{turn}:{output}")
        if chance.random() >= self._share:
            return []
        return self._index.memories(turn, chance.choice(PAST_COUNTS[self.task.kind]), self._places.get((turn, output)))

    @cached_property
    def _index(self) -> ItemIndex:
        return ItemIndex(self.task, self._items)

    @cached_property
    def _places(self) -> dict[tuple[str, str], int]:
        """Each pair's first place among the items."""
        pairs = [(place, item_pair(item, self.task)) for place, item in enumerate(self._items)]
        return {pair: place for place, pair in reversed(pairs) if pair is not None}


@dataclass(frozen=True, slots=True)
class Lesson:
    """One item to learn from: a complete user turn and what the person answered."""

    past: Past
    turn: str
    output: str

    def example(self, tokenizer: ChatTokenizer, max_tokens: int) -> Example:
        """The item as the model sees it, with the memories that fit into `max_tokens`."""
        task, turn, output = self.past.task, self.turn, self.output
        memories = self.past.memories(turn, output)
        return encode_recalling(tokenizer, task, turn, output, memories=memories, max_tokens=max_tokens)


def lessons(history: History, task: Task, share: float, seed: int) -> list[Lesson]:
    """A person's items to learn from; `share` and `seed` as in `Past`."""
    past = Past(task, history.items, share, seed)
    return [Lesson(past, *pair) for pair in history.pairs(task)]


def encode_recalling(
    tokenizer: ChatTokenizer, task: Task, turn: str, output: str, *, memories: Sequence[str], max_tokens: int
) -> Example:
    """As `encode_pair`, with the memories that fit before the turn."""
    messages = recalling(tokenizer, task, chat_messages(turn), output, memories=memories, max_tokens=max_tokens)
    return encode_pair(tokenizer, messages[-1]["content"], output, max_tokens)


def recalling(
    tokenizer: ChatTokenizer,
    task: Task,
    messages: list[dict[str, str]],
    output: str,
    *,
    memories: Sequence[str],
    max_tokens: int,
) -> list[dict[str, str]]:
    """A conversation with memories, the best first, before the user's turn that ends it.

    As in serving, a memory that does not fit into `max_tokens` ids of conversation and output makes way for the next.
    """
    turn, chosen, found = messages[-1]["content"], list[str](), messages
    for memory in memories:
        longer = [*messages[:-1], *chat_messages(remembering(task, turn, [*chosen, memory]))]
        if len(encode_conversation(tokenizer, longer, output).ids) <= max_tokens:
            chosen, found = [*chosen, memory], longer
    return found
