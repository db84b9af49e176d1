"""What the demo prints can be read at a usual width, and pasted into a shell."""

from __future__ import annotations

import io
import json
import shlex

from rich.console import Console

from deploy.demo.asking import Answer
from deploy.demo.report import answers_table, curl_lines

WIDTH = 100


def test_long_answers_wrap_and_nothing_is_cut() -> None:
    words = [f"word{i}" for i in range(60)]
    answers = {
        ("Why?", "nobody"): Answer(" ".join(words), True, "base", (), 81.2),
        ("Why?", "kai"): Answer(
            "- [red] is no markup\n- two", False, "merged", (("a00", 0.505), ("a02", 0.495)), 123.4
        ),
    }
    console = Console(width=WIDTH, record=True, file=io.StringIO())
    console.print(answers_table(["Why?"], answers, {"nobody": "no profile", "kai": "bullets"}))
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= WIDTH
    said = ("word59 …", "- [red] is no markup", "- two", "a00 0.505", "a02 0.495", "123 ms", "81 ms", "none", "Why?")
    assert [text for text in (*words[:-1], *said) if text not in shown] == []


def test_each_call_to_try_is_one_shell_command_with_json() -> None:
    lines = curl_lines("http://127.0.0.1:8000", "kai").replace("\\\n", " ").splitlines()
    calls = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert [call[0] for call in calls] == ["curl"] * len(calls)
    bodies = [json.loads(call[call.index("-d") + 1]) for call in calls if "-d" in call]
    assert [body.get("user_id") for body in bodies] == ["kai", None, "me"]
