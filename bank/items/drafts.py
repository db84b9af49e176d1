"""Drafts and what must stay of them: notes in place of a draft that nobody has, and the facts of a text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

MIN_NOTES = 3  # words; fewer say nothing of a text
_WORD = re.compile(r"\S+")
_EDGES = "\"'“”‘’„«»()[]{}<>*_,;:.!?…"
_FACTS = {
    "links": re.compile(r"https?://[^\s<>\"')\]]+[\w/]|\bwww\.[^\s<>\"')\]]+[\w/]"),
    "addresses": re.compile(r"[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "numbers": re.compile(r"\d+(?:[.,:/-]\d+)*"),
    "names": re.compile(r"(?<=[^\s.!?…:\n\"“„(>*-][ \t])[^\W\d_a-zà-öø-ÿ][\w'’-]*\w"),
}


def notes_of(text: str) -> str:
    """Return the content words, names and numbers of a text in their order, separated by commas; nothing if too few."""
    words = (word.strip(_EDGES) for word in _WORD.findall(text))
    kept = [word for word in words if any(map(str.isalnum, word)) and word.casefold() not in _function_words()]
    return ", ".join(kept) if len(kept) >= MIN_NOTES else ""


@cache
def _function_words() -> frozenset[str]:
    from bm25s import stopwords

    lists = (value for name, value in vars(stopwords).items() if name.startswith("STOPWORDS_"))
    return frozenset(word for words in lists for word in words)


def facts_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each kind of fact with the facts of a text; names are capitalised words that do not begin a sentence."""
    for kind, pattern in _FACTS.items():
        yield kind, list(dict.fromkeys(pattern.findall(text)))
        text = pattern.sub(" ", text)


def kept(draft: str, answer: str) -> tuple[dict[str, str], list[str], list[str]]:
    """Return how many of a draft's facts stand in an answer, by kind, those that are missing, and those it adds."""
    counts, missing, added = dict[str, str](), list[str](), list[str]()
    for (kind, wanted), (_, found) in zip(facts_of(draft), facts_of(answer), strict=True):
        lost = [fact for fact in wanted if not _stands(fact, answer)]
        if wanted:
            counts[kind] = f"{len(wanted) - len(lost)} of {len(wanted)}"
        missing += lost
        added += [fact for fact in found if not _stands(fact, draft)]
    return counts, missing, added


def _stands(fact: str, text: str) -> bool:
    """Whether a fact stands in a text as a whole; people write names in lower case, too."""
    return re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", text, re.IGNORECASE) is not None
