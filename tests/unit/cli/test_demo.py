"""The demo: people whose manners a program can tell apart, output that can be read and pasted, and its end."""

from __future__ import annotations

import io
import json
import re
import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
from rich.console import Console

from bank.items.profile import item_pair, item_text, parse_item, profile_embedding
from bank.items.tasks import get_task
from bank.lookup.embedder import Embedder
from demo import adapting, tour
from demo.answers import DemoAnswer, answers_table, ask, curl_lines
from demo.manners import GARDENER, MANNERS, NIGHT_OWL, PLANNER, SIGN_OFF, Manner
from demo.personas import PEOPLE, QUESTIONS, anchors
from mta_client import Chunk
from server.cli.demo import steps as demo
from server.cli.demo.server import Server

PLAIN = "Boil the water in London. Add the tea and wait."
MIN_ITEMS = 30
WIDTH = 100
ANCHORS = anchors(seed=0)


def _sentences(text: str) -> set[str]:
    """What is said, whatever the manner: without case, bullets, greeting and sign-off."""
    parts = re.split(r"[.!?]\s|[.!?]?\n", text.lower() + "\n")
    said = {part.strip(" -.!?") for part in parts}
    return {part for part in said if not part.startswith(("dear friend,", SIGN_OFF.lower(), "sent by", "~"))} - {""}


def _manner_of(user: dict[str, object]) -> Manner:
    return next(manner for manner in MANNERS if str(user["user_id"]).startswith(f"{manner.world}-"))


@pytest.mark.parametrize(
    ("manner", "text", "shows"),
    [
        (NIGHT_OWL, "boil the water. wait.", True),
        (NIGHT_OWL, "boil the water in London.", False),
        (NIGHT_OWL, "42", False),
        (PLANNER, "- Boil the water\n\n- Wait", True),
        (PLANNER, "First:\n- Boil the water", False),
        (PLANNER, "1. Boil the water\n2. Wait", False),
        (PLANNER, "", False),
        (GARDENER, f"Boil the water.\n\n{SIGN_OFF}, Rosa\n", True),
        (GARDENER, f"{SIGN_OFF}, boil\nthe water.", False),
    ],
)
def test_mark_is_told_mechanically(manner: Manner, text: str, shows: bool) -> None:
    assert manner.shows(text) is shows


def test_every_item_of_an_anchor_bears_its_mark_alone_and_trains() -> None:
    for manner in MANNERS:
        assert [other for other in MANNERS if other.shows(manner.write(PLAIN, "Rosa"))] == [manner]
        assert not manner.shows(PLAIN)
    task = get_task("chat")
    assert ANCHORS == anchors(seed=0) != anchors(seed=4)
    for user in ANCHORS:
        items = [parse_item(raw, task, position) for position, raw in enumerate(user["profile"])]
        pairs = [item_pair(item, task) for item in items]
        assert len(set(pairs)) == len(pairs) >= MIN_ITEMS
        assert None not in pairs
        assert all(_manner_of(user).shows(output) for _, output in pairs)


def test_demo_people_have_anchors_and_untrained_sentences() -> None:
    assert {person.manner for person in PEOPLE} == set(MANNERS)
    for manner in MANNERS:
        assert sum(_manner_of(user) is manner for user in ANCHORS) > 2
    items = [item for user in ANCHORS for item in user["profile"]]
    trained = set().union(*(_sentences(item[part]) for item in items for part in ("input", "output")))
    for person in PEOPLE:
        assert all(person.manner.shows(line) for line in person.lines)
        assert not trained & set().union(*map(_sentences, person.lines))
    assert len(set(QUESTIONS)) == len(QUESTIONS) == 5
    assert not {item["input"] for item in items} & set(QUESTIONS)


def test_the_lines_of_each_person_find_anchors_of_their_manner(embedder: Embedder) -> None:
    task = get_task("chat")

    def embedding(items: list[dict[str, str]]) -> np.ndarray:
        texts = [item_text(parse_item(raw, task, position), task) for position, raw in enumerate(items)]
        return profile_embedding(embedder.embed(texts))

    bank = np.stack([embedding(user["profile"]) for user in ANCHORS])
    for person in PEOPLE:
        similarities = bank @ embedding([{"text": line} for line in person.lines])
        nearest = np.argsort(-similarities)[:2]
        assert [_manner_of(ANCHORS[i]) for i in nearest] == [person.manner] * 2


def test_long_answers_wrap_and_nothing_is_cut() -> None:
    words = [f"word{i}" for i in range(60)]
    spoke = (("a00", 0.505), ("a02", 0.495))
    answers = {
        ("Why?", "nobody"): DemoAnswer(" ".join(words), True, "base", (), 81.2),
        ("Why?", "kai"): DemoAnswer("- [red] is no markup\n- two", False, "merged", spoke, 123.4),
    }
    console = Console(width=WIDTH, record=True, file=io.StringIO())
    console.print(answers_table(["Why?"], answers, {"nobody": "no profile", "kai": "bullets"}))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= WIDTH
    said = ("word59 …", "- [red] is no markup", "- two", "a00 0.505", "a02 0.495", "123 ms", "81 ms", "none", "Why?")
    assert [text for text in (*words[:-1], *said) if text not in shown] == []


def test_what_own_phrases_proposed_is_underlined_where_it_stands() -> None:
    first = Chunk("", None, MagicMock(level="merged", anchors=()), None, None)
    said = [Chunk(text, None, None, None, None, moved) for text, moved in ((" Rest.\n", 0), ("With", 1), (" love ", 2))]
    client = MagicMock(**{"stream.return_value": [first, *said, Chunk("", "stop", None, {}, {}, 3)]})
    answer = ask(client, "rosa", "Why?")
    shown = answer.shown
    assert (shown.plain, answer.moved) == ("Rest.\nWith love", 3)
    assert [(shown.plain[span.start : span.end], span.style) for span in shown.spans] == [
        ("With", "underline"),
        (" love", "underline"),
    ]


def test_both_tables_count_own_words_where_styles_vanish() -> None:
    counted, plain = (DemoAnswer("Rest.", False, "merged", (("a00", 0.5),), 81.2, moved) for moved in (9, 0))
    console = Console(width=WIDTH, record=True, file=io.StringIO())
    for table in (
        answers_table(["Why?"], {("Why?", "rosa"): counted, ("Why?", "kai"): plain}, {"rosa": "love", "kai": "none"}),
        adapting.before_and_after([plain], [counted]),
    ):
        console.print(table)
        assert re.findall(r"own words (\d+)", console.export_text()) == ["9"]


def test_each_call_to_try_is_one_shell_command_with_json() -> None:
    lines = curl_lines("http://127.0.0.1:8000", "kai").replace("\\\n", " ").splitlines()
    calls = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert [call[0] for call in calls] == ["curl"] * len(calls)
    bodies = [json.loads(call[call.index("-d") + 1]) for call in calls if "-d" in call]
    assert [body.get("user_id") for body in bodies] == ["kai", None, "me"]


def test_demo_without_terminal_shows_tables_and_stops_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    stopped: list[str] = []

    @contextmanager
    def server(*_: object) -> Iterator[Server]:
        yield Server(MagicMock(), MagicMock())
        stopped.append(capsys.readouterr().out)

    progress = {"steps": 12, "loss": [(1, 3.0), (12, 2.0)]}
    job = MagicMock(state="succeeded", error=None, progress=progress, held_out={"before": 3.0, "after": 2.0})
    for name, stand_in in {
        "run_mta": MagicMock(),
        "demo_bank": MagicMock(),
        "running_server": server,
    }.items():
        monkeypatch.setattr(demo, name, stand_in)
    monkeypatch.setattr(tour, "ask", lambda *_: DemoAnswer("said", False, "merged", (("a00", 0.5),), 81.2))
    monkeypatch.setattr(adapting, "train", lambda *_: (job, 9.0))
    monkeypatch.setattr(signal, "signal", MagicMock())
    assert demo.show(tmp_path) == 0
    (shown,) = stopped
    assert all(text in shown for text in ("Asked by", "succeeded after 12 steps", "3.00 → 2.00", "before and after"))
    assert "Ctrl-C" not in shown
