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
    "addresses": re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "numbers": re.compile(r"\d+(?:[.,:/-]\d+)*"),
    "names": re.compile(r"(?<=[^\s.!?…:\n\"“„(>*-][ \t])[^\W\d_a-zà-öø-ÿ][\w'’-]*\w"),
}
_NAME = re.compile(r"\w[\w'’-]*")


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


def kept(draft: str, answer: str) -> tuple[dict[str, str], list[str], list[str]]:
    """Return how many of a draft's facts stand in an answer, by kind, those that are missing, and those it adds.

    Facts are links, addresses, numbers, and names: capitalised words that do not begin a sentence, which the other text
    may write in lower case.
    """
    counts, missing, added = dict[str, str](), list[str](), list[str]()
    words = [set(map(str.casefold, _NAME.findall(text))) for text in (draft, answer)]
    for (kind, wanted), (_, present) in zip(_facts(draft), _facts(answer), strict=True):
        in_draft, in_answer = words if kind == "names" else (wanted, present)
        lost = [shown for fact, shown in wanted.items() if fact not in in_answer]
        if wanted:
            counts[kind] = f"{len(wanted) - len(lost)} of {len(wanted)}"
        missing += lost
        added += [shown for fact, shown in present.items() if fact not in in_draft]
    return counts, missing, added


def _facts(text: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each kind of fact with the facts of a text, in their order: without case, and as written."""
    for kind, pattern in _FACTS.items():
        yield kind, {fact.casefold(): fact for fact in pattern.findall(text)}
        text = pattern.sub(" ", text)
