"""What a person wrote themselves in a text: no code, no quotes, nothing that an app has put around it."""

from __future__ import annotations

import re

MIN_LETTERS = 16  # a shorter text says nothing about its writer
_FENCED = re.compile(r"```.*?(```|\Z)", re.DOTALL)
_QUOTED = re.compile(r"^[ \t]*>.*$", re.MULTILINE)
_TAG = re.compile(r"<(/?)([A-Za-z][\w-]*+)[^<>]*+>")
_CODE_LINE = re.compile(
    r"[;{}]\s*$|^\s*(def|class|import|from|return|#include|function|const|let|var|SELECT)\b|[=<>]{2}|\w\("
)
_CODE_SHARE = 0.5  # share of code lines above which a text is code


def own_words(text: str) -> str:
    """Return what a person wrote in a text, without code blocks and quotes; empty if that is short or code.

    A text with a pair of tags is markup, or an app has put its own prompt around the words, for example with the
    content of a file: nothing of it is learnt.
    """
    words = without_quotes(_FENCED.sub("", text))
    tags = {(mark, name.lower()) for mark, name in _TAG.findall(words)}
    if any(("", name) in tags for mark, name in tags if mark):
        return ""
    lines = [line for line in words.splitlines() if line.strip()]
    is_code = sum(bool(_CODE_LINE.search(line)) for line in lines) > _CODE_SHARE * len(lines)
    return "" if is_code or sum(map(str.isalpha, words)) < MIN_LETTERS else words


def without_quotes(text: str) -> str:
    """Return a text without the lines that quote another, which begin with `>`."""
    return _QUOTED.sub("", text).strip()
