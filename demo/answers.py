"""Ask the demo's server; a table of its answers, and calls to try."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table
from rich.text import Text

from mta_client import Client, Personalization

MAX_TOKENS = 80
_OWN_LINES = ("The hedge is trimmed and the apples are in.", "Sowed beans and sweet peas by the gate.")


@dataclass(frozen=True, slots=True)
class DemoAnswer:
    text: str
    cut: bool  # whether it reached the token limit
    level: str  # `base`, `merged` or `stacked`
    anchors: tuple[tuple[str, float | None], ...]  # (id, weight) of the merged anchors, nearest first
    ttft_ms: float  # time to the first token
    moved: int = 0  # number of tokens that the person's own phrases had proposed
    own: tuple[tuple[int, int], ...] = ()  # where the chunks with these tokens begin and end in the text

    @property
    def shown(self) -> Text:
        text = Text(self.text)
        for begin, end in self.own:
            text.stylize("underline", begin, end)
        return text.append(" …" if self.cut else "", "dim")

    @property
    def own_words(self) -> tuple[str, ...]:
        """The number of tokens in words, for where no underline shows; empty if there are none."""
        return (f"own words {self.moved}",) if self.moved else ()


def ask(client: Client, user_id: str, question: str) -> DemoAnswer:
    """Stream a greedy answer."""
    sent_s = time.perf_counter()
    first_token_s = finish_reason = None
    text, moved, own = "", 0, list[tuple[int, int]]()
    who: Personalization | None = None
    for chunk in client.stream(user_id, question, max_tokens=MAX_TOKENS, temperature=0):
        who, finish_reason, moved = chunk.personalization or who, chunk.finish_reason, chunk.moved
        if chunk.text:
            first_token_s = first_token_s or time.perf_counter()
            begin, text = len(text), (text + chunk.text).lstrip()
            if chunk.moved:
                own.append((begin, len(text)))
    ttft_ms = ((first_token_s or time.perf_counter()) - sent_s) * 1000
    assert who is not None  # every stream begins with it
    anchors = tuple((anchor.id, anchor.weight) for anchor in who.anchors)
    return DemoAnswer(text.rstrip(), finish_reason == "length", who.level, anchors, ttft_ms, moved, tuple(own))


def answers_table(
    questions: Sequence[str], answers: Mapping[tuple[str, str], DemoAnswer], people: Mapping[str, str]
) -> Table:
    caption = "Anchors: those in the bank whose adapters were merged for the answer, with their weights."
    if any(answer.moved for answer in answers.values()):  # none where the anchors know a person's habits already
        caption += "\nUnderlined: from the person's own repeated words; “own words” counts their tokens."
    table = Table(
        box=box.ROUNDED,
        title="The same questions, asked by different people",
        title_justify="left",
        caption=caption,
        caption_justify="left",
    )
    table.add_column("Asked by", max_width=20)
    table.add_column("Answer", ratio=1)
    table.add_column("Anchors", no_wrap=True)
    table.add_column("First token", justify="right", no_wrap=True)
    for question in questions:
        table.add_row("", Text(question, style="bold"))
        for user_id, look_for in people.items():
            answer = answers[question, user_id]
            who = Text("\n").append(user_id, "bold cyan").append(f"\n{look_for}", "dim")
            anchors = [f"{name} {weight or 0:.3f}" for name, weight in answer.anchors] or ["none"]
            spoke = "\n".join((*anchors, *answer.own_words))
            table.add_row(who, Text("\n") + answer.shown, f"\n{spoke}", f"\n{answer.ttft_ms:.0f} ms")
        table.add_section()
    return table


def curl_lines(url: str, user_id: str) -> str:
    """Return shell commands to try next: ask as `user_id`, show their anchors, and write your own profile."""
    ask = {"user_id": user_id, "prompt": "How do I get over a bad day?"}
    profile = {"items": [{"text": line} for line in _OWN_LINES]}
    return "\n".join(
        [
            f"# ask as {user_id}, or as anybody else",
            _curl(f"{url}/generate", ask),
            f"# which anchors speak for {user_id}",
            _curl(f"{url}/users/{user_id}"),
            "# write a few lines of your own, and ask as yourself",
            _curl(f"{url}/users/me/profile", profile, "-X PUT "),
            _curl(f"{url}/generate", ask | {"user_id": "me"}),
        ]
    )


def _curl(url: str, body: object = None, options: str = "") -> str:
    data = f" -H 'Content-Type: application/json' \\\n  -d {shlex.quote(json.dumps(body))}" if body else ""
    return f"curl -s {options}{url}{data}"
