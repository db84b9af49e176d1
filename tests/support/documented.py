"""The code blocks of a page, and what a reader would do with each."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.node import run_module

ROOT = Path(__file__).parents[2]
DOCUMENTED_URL = "http://localhost:8000"
_BLOCK = re.compile(r"^(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
# What an answer says on any bank.
_STEADY = re.compile(r'"(?:level|object|source|type|param|code|reason|user_id|message)": ?(?:"(?:[^"\\]|\\.)*"|null)')


@dataclass(frozen=True, slots=True)
class Block:
    line: int  # of its page, where the code begins
    language: str
    text: str
    reason: str | None  # why it is not run, from an HTML comment on the line before


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [
        Block(text.count("\n", 0, found.start("text")) + 1, found["language"], found["text"], found["reason"])
        for found in _BLOCK.finditer(text)
    ]


class Reader:
    """Somebody who tries a page's blocks one after the other in a `folder`, on the server at a URL."""

    def __init__(self, url: str, folder: Path, settings: Mapping[str, str]) -> None:
        self._url = url
        self._folder = folder
        self._names: dict[str, Any] = {}
        self._last = ""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self._environment = os.environ | {"PATH": path} | settings

    def try_block(self, block: Block) -> None:
        """Run a block; fail if it fails or an answer lacks what the page shows of it."""
        text = block.text.replace(DOCUMENTED_URL, self._url).replace(DOCUMENTED_URL[7:], self._url)
        if block.language == "python":
            exec(compile("\n" * (block.line - 1) + text, "the page", "exec"), self._names)
        elif block.language == "js":
            (self._folder / "block.mjs").write_text(text, encoding="utf-8")
            done = run_module(self._folder, "block.mjs", environment={})
            assert done.returncode == 0, done.stderr
        else:
            assert block.language == "console", f"nobody knows how to run {block.language!r}"
            for command, shown in calls_of(text):
                self._type(command, shown)

    def _type(self, command: str, shown: str) -> None:
        filled_in = command.replace(", … ten of them …", "").replace("/jobs/…", f"/jobs/{self._last}")
        filled_in = filled_in.replace('"answer": "…"', f'"answer": "{self._last}"')
        where: dict[str, Any] = {"cwd": self._folder, "env": self._environment, "capture_output": True, "text": True}
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", filled_in], timeout=240, check=False, **where)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        if found := re.search(r'^\{"id": ?"([^"]+)"', done.stdout):
            self._last = found[1]
        if shown:
            check_shown(shown, done.stdout)


def calls_of(text: str) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with what is shown of its answer."""
    for call in re.findall(r"^\$ (.*?)(?=^\$ |\Z)", text, re.DOTALL | re.MULTILINE):
        lines = call.splitlines(keepends=True)
        end = next(n for n in range(1, len(lines) + 1) if _is_whole("".join(lines[:n])))
        yield "".join(lines[:end]), "".join(lines[end:])


def _is_whole(command: str) -> bool:
    """Whether a shell would run it, rather than wait for another line."""
    asked = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True, check=False)
    return not asked.stderr and not command.endswith("\\\n")


def check_shown(shown: str, answered: str) -> None:
    """Fail unless an answer is what a page shows of it, as far as no bank and no machine has a say in it."""
    names = set(re.findall(r'"(\w+)":', shown))
    if not names:
        assert _skeleton(shown) == _skeleton(answered)
        return
    assert not (lacking := names - set(re.findall(r'"(\w+)":', answered))), f"the answer lacks {lacking}: {answered}"
    steady, found = (
        {re.sub(r'": ?', '":', pair, count=1) for pair in _STEADY.findall(text)} for text in (shown, answered)
    )
    assert steady <= found, f"the answer lacks {steady - found}: {answered}"
    assert ('"error": {' in shown) == ('"error":{' in answered), answered


def _skeleton(text: str) -> str:
    """A text without its figures and fingerprints."""
    return re.sub(r"\b[0-9a-f]{8}\b|\d+(?:\.\d+)?", "#", text).strip()
