"""A person's training data: their items, a share of them with past items of the same person in the prompt.

A model that was never trained with past items in the prompt treats them as noise. An item's prompt never contains the
item itself, a later one, or the answer that is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adapters.training.example import Example
from bank.items.histories import History
from bank.items.profile import Item, item_pair, normalised
from bank.items.prompt import chat_messages, encode_conversation, encode_pair
from bank.items.retrieval import ItemIndex, searchable, turn_with_memories
from bank.items.tasks import PAST_COUNTS, Task

END_CHARS = 160  # of an answer, which tell it where answers are texts: of a plain text, a lesson may hold the end alone
QUOTED_WORDS = 8  # length from which on an answer is recognised within a longer text


@dataclass(frozen=True, eq=False)
class PastItems:
    """A person's items, oldest first, put into prompts for a `fraction` (0 to 1) of the turns, drawn by the seed."""

    task: Task
    items: Sequence[Item]
    fraction: float
    seed: int

    def memories(self, turn: str, output: str) -> list[str]:
        """Return the past items to put before a turn, as prompts quote them, best first; often none or one.

        If the turn and output are an item of this person, only earlier items are used; otherwise all items are. Where
        answers are texts, none is used that tells this one. Labels recur, and leaving them out would tell them.
        """
        chance = random.Random(f"{self.seed}:{turn}:{output}")
        if chance.random() >= self.fraction:
            return []
        asked = normalised(output)
        is_text, is_long = self.task.kind == "text", len(searchable(asked).split()) >= QUOTED_WORDS
        first = self._places.get((normalised(turn), asked), len(self._pairs))

        def usable(position: int, memory: str) -> bool:
            tells = is_text and (self._pairs[position][1] == asked or (is_long and asked in normalised(memory)))
            return position < first and not tells

        return self._index.memories(turn, chance.choice(PAST_COUNTS[self.task.kind]), usable)

    @cached_property
    def _index(self) -> ItemIndex:
        return ItemIndex(self.task, self.items)

    @cached_property
    def _pairs(self) -> list[tuple[str, str]]:
        """The items' turns and outputs, normalised; empty texts for plain items."""
        pairs = [item_pair(item, self.task) or ("", "") for item in self.items]
        return [(normalised(turn), normalised(output)) for turn, output in pairs]

    @cached_property
    def _places(self) -> dict[tuple[str, str], int]:
        """Index of each pair's first occurrence among the items."""
        return {pair: position for position, pair in reversed(list(enumerate(self._pairs)))}


def lesson_key(task: Task, turn: str, output: str) -> tuple[str, str]:
    """Return what all pairs of one lesson share: where answers are texts, an app may word the turn otherwise."""
    if task.kind == "text":
        return "", normalised(output)[-END_CHARS:]
    return normalised(turn), normalised(output)


@dataclass(frozen=True, slots=True)
class Lesson:
    """One item to train on: a complete user turn and the person's answer."""

    past: PastItems
    turn: str
    output: str

    def example(self, tokenizer: Any, max_tokens: int) -> Example:
        task, turn, output = self.past.task, self.turn, self.output
        memories = self.past.memories(turn, output)
        return encode_with_memories(tokenizer, task, turn, output, memories=memories, max_tokens=max_tokens)


def lessons(history: History, task: Task, fraction: float, seed: int) -> list[Lesson]:
    """Return a person's items to train on; `fraction` and `seed` as in `PastItems`."""
    past = PastItems(task, history.items, fraction, seed)
    return [Lesson(past, *pair) for pair in history.pairs(task)]


def encode_with_memories(
    tokenizer: Any, task: Task, turn: str, output: str, *, memories: Sequence[str], max_tokens: int
) -> Example:
    """Encode a pair as `encode_pair` does, with the memories that fit before the turn."""
    messages = add_memories(tokenizer, task, chat_messages(turn), output, memories=memories, max_tokens=max_tokens)
    return encode_pair(tokenizer, messages[-1]["content"], output, max_tokens)


def add_memories(
    tokenizer: Any, task: Task, messages: list[dict[str, str]], output: str, *, memories: Sequence[str], max_tokens: int
) -> list[dict[str, str]]:
    """Add memories, best first, to the turn that ends a conversation; skip those with which it would be too long."""
    turn, chosen, extended = messages[-1]["content"], list[str](), messages
    for memory in memories:
        longer = [*messages[:-1], *chat_messages(turn_with_memories(task, turn, [*chosen, memory]))]
        if len(encode_conversation(tokenizer, longer, output).ids) <= max_tokens:
            chosen, extended = [*chosen, memory], longer
    return extended
