"""Past items in the prompt: the most relevant ones by BM25, rendered by the task's template before the user's turn.

Serving, training and evaluation all use it. The templates are LaMP's own (Salemi et al., ACL 2024, table of prompts).
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Sequence

from bank.items.profile import Item, is_pair, item_text
from bank.items.tasks import Task, get_task

JOIN = ", and "
_POSTING_BYTES = 8  # a word in a text: its score and the text's number
_WORD_BYTES = 128  # a word of the vocabulary, beyond its letters: its number, and its place in a dictionary and a set


class ItemIndex:
    """A history, the oldest item first, ready to be searched; items that have too little to quote are left out."""

    def __init__(self, task: Task, items: Sequence[Item]) -> None:
        import bm25s

        rendered = [(place, item_text(item, task), _memory(task, item)) for place, item in enumerate(items)]
        known = [(place, text, memory) for place, text, memory in rendered if memory is not None]
        self._task = task
        self._places = [place for place, _, _ in known]
        self._memories = [memory for _, _, memory in known]
        self._retriever = None
        self.size_bytes = sum(map(sys.getsizeof, self._memories))  # about how much memory it takes
        words = bm25s.tokenize([text for _, text, _ in known], show_progress=False)
        if words.vocab:  # texts of stop words alone have none
            self._retriever = bm25s.BM25()
            self._retriever.index(words, show_progress=False)
            self.size_bytes += sum(sys.getsizeof(word) + _WORD_BYTES for word in words.vocab)
            self.size_bytes += _POSTING_BYTES * sum(map(len, words.ids))

    def memories(self, turn: str, count: int, before: int | None = None) -> list[str]:
        """At most `count` items as prompts quote them, by BM25 against the turn: best first, newest among equals.

        Only the history's first `before` items are searched; all of them when None.
        """
        import bm25s

        query = turn.removeprefix(self._task.instruction)
        (words,) = bm25s.tokenize([query], show_progress=False, return_ids=False)
        scores: Sequence[float] = [0.0] * len(self._memories)
        if self._retriever is not None and words:  # a turn of stop words alone has none
            scores = self._retriever.get_scores(words)
        searched = len(self._memories) if before is None else bisect_left(self._places, before)
        best = sorted(range(searched), key=lambda place: (-scores[place], -place))[:count]
        return [self._memories[place] for place in best]


def turn_with_memories(task: Task, turn: str, memories: Sequence[str]) -> str:
    """A user turn with past items before it; the turn alone when there are none."""
    if not memories:
        return turn
    return task.remembering.format_map({"memories": JOIN.join(memories), "input": turn})


def _memory(task: Task, item: Item) -> str | None:
    """A past item as a prompt quotes it; None for one that has too little to quote."""
    if all(name in item.fields for name in task.memory_fields):
        return task.memory.format_map(item.fields)
    return get_task("chat").memory.format_map(item.fields) if is_pair(item.fields) else None
