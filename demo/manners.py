"""The demo's manners of writing, each with a mark that a program can check."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

SIGN_OFF = "With love from the garden"
_BULLET = "- "
_SENT_BY = "Sent by"


@dataclass(frozen=True, slots=True)
class Manner:
    """A way of writing. The embedder sees topics, not style, so a person's topic leads to anchors with their manner."""

    world: str  # topic in `worlds.toml` of people with this manner
    mark: str  # in words
    write: Callable[[str, str], str]  # rewrites a plain answer of a few sentences in this manner, signed with a name
    shows: Callable[[str], bool]  # whether a text has the mark


def _in_lower_case(plain: str, name: str) -> str:
    return f"{plain}\n~ {name}".lower()


def _in_bullets(plain: str, name: str) -> str:
    sentences = [*re.split(r"(?<=[.!?])\s+", plain.strip()), f"{_SENT_BY} {name}"]
    return "\n".join(_BULLET + sentence.removesuffix(".") for sentence in sentences)


def _as_letter(plain: str, name: str) -> str:
    return f"Dear friend,\n{plain}\n\n{SIGN_OFF}, {name}"


def _all_lower_case(text: str) -> bool:
    return text == text.lower() and any(character.islower() for character in text)


def _all_bullets(text: str) -> bool:
    lines = [line for line in text.splitlines() if line.strip()]
    return bool(lines) and all(line.startswith(_BULLET) for line in lines)


def _signed_off(text: str) -> bool:
    return text.rstrip().rpartition("\n")[2].startswith(SIGN_OFF)


NIGHT_OWL = Manner("games", "all lower case", _in_lower_case, _all_lower_case)
PLANNER = Manner("office", "nothing but bullet points", _in_bullets, _all_bullets)
GARDENER = Manner("garden", "signed off with love", _as_letter, _signed_off)

MANNERS = (NIGHT_OWL, PLANNER, GARDENER)
