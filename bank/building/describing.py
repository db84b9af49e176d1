"""Typical words of each anchor, for people who look at a bank; only where a build is told to keep them.

They are an anchor's own words, and so say something about a person. A word that they used in one item alone, which may
be a name or a number of somebody's, is never taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bank.items.histories import History
from bank.items.profile import item_text
from bank.items.tasks import Task

WORDS = 6
_WORD = r"(?u)\b[^\W\d_]{3,}\b"


def typical_words(anchors: Sequence[History], task: Task, count: int = WORDS) -> list[tuple[str, ...]]:
    """The words that tell an anchor from the others (tf-idf, English stop words left out), the most typical first."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(token_pattern=_WORD, stop_words="english", sublinear_tf=True)
    words_of = vectorizer.build_analyzer()
    seen = [[words_of(item_text(item, task)) for item in anchor.items] for anchor in anchors]
    try:
        scores = vectorizer.fit_transform(" ".join(word for item in items for word in item) for items in seen)
    except ValueError:  # there are only stop words
        return [()] * len(anchors)
    names = vectorizer.get_feature_names_out()
    found = []
    for items, row in zip(seen, scores, strict=True):
        spread = Counter(word for item in items for word in set(item))
        ranked = sorted(zip(-row.data, names[row.indices], strict=True))
        found.append(tuple(str(word) for _, word in ranked if spread[word] > 1)[:count])
    return found
