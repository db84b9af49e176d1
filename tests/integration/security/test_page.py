"""`docs/security.md` names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
FEWEST_CASES = 40
_CASE = re.compile(r"^\| .+ \| .+ \| `(tests/[^`]+)` \|$", re.M)


def test_every_case_has_a_test() -> None:
    cases = _CASE.findall((ROOT / "docs" / "security.md").read_text("utf-8"))
    assert len(set(cases)) == len(cases) >= FEWEST_CASES
    assert [case for case in cases if not _exists(case)] == []


def _exists(case: str) -> bool:
    """Whether a file has the test that an id of pytest's names."""
    file, *names = case.split("::")
    inside: list[ast.stmt] = ast.parse((ROOT / file).read_text("utf-8")).body
    for name in names:
        found = [node for node in inside if getattr(node, "name", "") == name]
        if not found:
            return False
        inside = getattr(found[0], "body", [])
    return bool(names)
