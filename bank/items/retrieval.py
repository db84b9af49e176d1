"""Past items in the prompt: retrieve the most relevant by BM25, and render them before the turn in LaMP's words."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Sequence
from itertools import islice

from bank.items.profile import Item, item_pair, item_text
from bank.items.tasks import Task, get_task

JOIN = ", and "
_UNSPACED = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]+"
)  # Thai, Lao, Burmese, Khmer, Japanese, Chinese
_POSTING_BYTES = 8  # memory per word in a text: a score and the text's position
_WORD_BYTES = 128  # memory per vocabulary word beyond its string: its id, a dictionary entry and a set entry


class ItemIndex:
    """A search index of a history, oldest item first; items without the fields that prompts quote are excluded."""

    def __init__(self, task: Task, items: Sequence[Item]) -> None:
        import bm25s

        known = [(at, item, memory) for at, item in enumerate(items) if (memory := _memory(task, item)) is not None]
        self._task = task
        self._positions = [position for position, _, _ in known]
        self._memories = [memory for _, _, memory in known]
        self._retriever = None
        self.size_bytes = sum(map(sys.getsizeof, self._memories))  # approximate memory of the index
        words = bm25s.tokenize([searchable(item_text(item, task)) for _, item, _ in known], show_progress=False)
        if words.vocab:  # empty if the texts hold only stop words
            self._retriever = bm25s.BM25()
            self._retriever.index(words, show_progress=False)
            self.size_bytes += sum(sys.getsizeof(word) + _WORD_BYTES for word in words.vocab)
            self.size_bytes += _POSTING_BYTES * sum(map(len, words.ids))

    def memories(
        self, turn: str, count: int, usable: Callable[[int, str], bool] = lambda position, memory: True
    ) -> list[str]:
        """Return up to `count` items as prompts quote them, the best first; `usable` gets position and text."""
        import bm25s

        query = searchable(turn.removeprefix(self._task.instruction))
        (words,) = bm25s.tokenize([query], show_progress=False, return_ids=False)
        scores: Sequence[float] = [0.0] * len(self._memories)
        if self._retriever is not None and words:  # empty if the turn holds only stop words
            scores = self._retriever.get_scores(words)
        best = sorted(range(len(self._memories)), key=lambda position: (-scores[position], -position))
        memories = (self._memories[each] for each in best if usable(self._positions[each], self._memories[each]))
        return list(islice(memories, count))


def searchable(text: str) -> str:
    """Return a text without combining marks, and in pairs of letters where a script has no spaces between words."""
    if text.isascii():
        return text
    text = "".join(sign for sign in text if not unicodedata.category(sign).startswith("M"))
    return _UNSPACED.sub(lambda run: f" {' '.join(_pairs(run[0]))} ", text)


def _pairs(run: str) -> list[str]:
    return [run[start : start + 2] for start in range(max(1, len(run) - 1))]


def turn_with_memories(task: Task, turn: str, memories: Sequence[str]) -> str:
    """Put past items before a user turn; return the turn unchanged if there are none."""
    if not memories:
        return turn
    return task.remembering.format_map({"memories": JOIN.join(memories), "input": turn})


def _memory(task: Task, item: Item) -> str | None:
    """Return a past item as a prompt quotes it; None if it lacks the fields to quote."""
    if all(name in item.fields for name in task.memory_fields):
        return task.memory.format_map(item.fields)
    pair = item_pair(item, task)
    return get_task("chat").memory.format(input=pair[0], output=pair[1]) if pair else None
