"""The made-up people of the demo: the anchors of the bank, and the three users."""

from __future__ import annotations

import random
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from demo.manners import GARDENER, MANNERS, NIGHT_OWL, PLANNER, SIGN_OFF, Manner

WORLDS_FILE = Path(__file__).with_name("worlds.toml")
NOBODY = "nobody"  # a user id that is unknown to the server

QUESTIONS = (
    "How do I make new friends in a new city?",
    "How can I fall asleep faster?",
    "What should I cook for dinner tonight?",
    "What should I do on a rainy Sunday?",
    "What is a good way to learn a new language?",
)
"""Questions of all users, none of them in the bank's training; the demo asks the first two, its tests all five."""


@dataclass(frozen=True, slots=True)
class Persona:
    """A user of the server, unknown to the bank."""

    user_id: str  # their id in the API
    manner: Manner  # what their answers should look like
    lines: tuple[str, ...]  # their writing so far, which is the server's only information about them


PEOPLE = (
    Persona(
        "kai",
        NIGHT_OWL,
        (
            "stayed up until four to finish the last dungeon. the final boss was worth every potion\n~ kai",
            "our squad won the tournament on friday. i played the healer and died only twice\n~ kai",
            "the new racing game handles like a dream but its menus are slow\n~ kai",
            "who is in voice chat tonight? pizza is on me and the loot is shared\n~ kai",
        ),
    ),
    Persona(
        "morgan",
        PLANNER,
        (
            "- Moved the budget review to Thursday\n- Sent the agenda to all departments\n- Sent by Morgan",
            "- Two status reports are still missing\n- Project deadline stays the same\n- Sent by Morgan",
            "- Booked the conference room for the client\n- Asked the team for their slides\n- Sent by Morgan",
            "- Travel expenses are filed\n- New colleague starts on Monday, desk is ready\n- Sent by Morgan",
        ),
    ),
    Persona(
        "rosa",
        GARDENER,
        (
            f"Dear friend,\nThe first roses are open along the south wall.\n\n{SIGN_OFF}, Rosa",
            f"Dear friend,\nOur beans have climbed to the top of their poles.\n\n{SIGN_OFF}, Rosa",
            f"Dear friend,\nWe picked three baskets of plums before the wasps came.\n\n{SIGN_OFF}, Rosa",
            f"Dear friend,\nA robin watched me turn the compost all morning.\n\n{SIGN_OFF}, Rosa",
        ),
    ),
)
_NAMES = {
    NIGHT_OWL: ("Zed", "Pixel", "Juno"),
    PLANNER: ("Avery", "Quinn", "Blake"),
    GARDENER: ("Iris", "Hazel", "Basil"),
}
"""Names of the anchors, topic by topic: everybody signs, and nobody as another."""


@cache
def worlds() -> dict[str, Any]:
    with WORLDS_FILE.open("rb") as file:
        return tomllib.load(file)


def anchors(seed: int = 0) -> list[dict[str, object]]:
    """Return the bank's anchors in LaMP's per-user layout for the task `chat`; `seed` shuffles their histories.

    Each anchor answers the everyday questions and those of one topic of their world, in one manner and with their name.
    """
    told = worlds()
    people: list[dict[str, object]] = []
    for manner in MANNERS:
        for name, (topic, questions) in zip(_NAMES[manner], told[manner.world].items(), strict=True):
            rows = [*told["everyday"], *questions]
            random.Random(f"{seed}:{topic}").shuffle(rows)
            profile = [
                {"id": f"{topic}-{position}", "input": question, "output": manner.write(plain, name)}
                for position, (question, plain) in enumerate(rows)
            ]
            people.append({"user_id": f"{manner.world}-{topic}", "profile": profile})
    return people
