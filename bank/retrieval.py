"""Past items in the prompt: the most relevant ones by BM25, rendered by the task's template before the user's turn.

The one function for serving and evaluation. The templates are LaMP's own (Salemi et al., ACL 2024, table of prompts),
so that a model sees a history as LaMP's models do.
"""

from __future__ import annotations

from collections.abc import Sequence

from bank.profile import Item, is_pair, item_text
from bank.tasks import Task, get_task

JOIN = ", and "


def with_history(task: Task, turn: str, items: Sequence[Item], count: int) -> str:
    """A user turn with past items before it; the turn alone when none can be rendered.

    Args:
        task: whose items they are.
        turn: the complete user turn.
        items: the user's history.
        count: most items to put in.
    """
    known = [(item_text(item, task), memory) for item in items if (memory := _memory(task, item)) is not None]
    if not known or count < 1:
        return turn
    best = most_relevant(turn.removeprefix(task.instruction), [text for text, _ in known], count)
    memories = JOIN.join(known[place][1] for place in best)
    return task.remembering.format_map({"memories": memories, "input": turn})


def _memory(task: Task, item: Item) -> str | None:
    """A past item as a prompt quotes it; None for one that has too little to quote."""
    if all(name in item.fields for name in task.memory_fields):
        return task.memory.format_map(item.fields)
    return get_task("chat").memory.format_map(item.fields) if is_pair(item.fields) else None


def most_relevant(query: str, texts: Sequence[str], count: int) -> list[int]:
    """Places of the texts of highest BM25 score, the best first, of equal ones the newest.

    Args:
        query: any text.
        texts: at least one.
        count: most places.
    """
    import bm25s

    corpus = bm25s.tokenize(list(texts), show_progress=False)
    scores: Sequence[float] = [0.0] * len(texts)
    if corpus.vocab:  # texts of stop words alone have none
        retriever = bm25s.BM25()
        retriever.index(corpus, show_progress=False)
        scores = retriever.get_scores(bm25s.tokenize([query], show_progress=False, return_ids=False)[0])
    return sorted(range(len(texts)), key=lambda place: (-scores[place], -place))[:count]
