"""Lua scripts, from `server/store/lua`. Each changes one user's keys atomically.

Times come from the server's clock alone. A script may run twice, because its answer can be lost. The second run changes
nothing and returns the same answer, but it repeats the write, because Redis waits for durability only after a write.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from redis.exceptions import NoScriptError

T = TypeVar("T")

FOLDER = Path(__file__).parents[1] / "lua"
_USES = re.compile(r"-- uses: (.*)\n")


@dataclass(frozen=True)
class Script:
    text: str

    @cached_property
    def sha1(self) -> str:
        """The name by which a server that has run it knows it."""
        return hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()

    async def run(self, execute: Callable[..., Awaitable[T]], names: Sequence[str], arguments: Sequence[Any]) -> T:
        """Run it by its hash, or by its text on a server that has not run it; `execute` sends a command."""
        given = (len(names), *names, *arguments)
        try:
            return await execute("EVALSHA", self.sha1, *given)
        except NoScriptError:
            return await execute("EVAL", self.text, *given)


def script(name: str, *, runs_when_full: bool = False) -> Script:
    """Load a script after the files that its first line says it uses.

    With `runs_when_full` it also runs at `maxmemory`: for erasures, worker progress, limits and API keys.
    """
    parts = dict[str, str]()
    _read(name, parts)
    return Script("#!lua flags=allow-oom\n" * runs_when_full + "".join(parts.values()))


def _read(name: str, parts: dict[str, str]) -> None:
    """Add a file and, before it, what it uses, each once."""
    text = (FOLDER / f"{name}.lua").read_text("utf-8")
    for used in uses[1].split(", ") if (uses := _USES.match(text)) else ():
        if used not in parts:
            _read(used, parts)
    parts[name] = text
