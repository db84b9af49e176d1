"""What files say: who reaches whom in compose, and that `docs/security.md` names tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[3]
FILE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = FILE["services"]
FETCHES_MODELS = {"models"}
"""Runs once and reaches a hub; it is in no network with anything else of ours."""

SHOWN_TO_OPERATORS = {"alertmanager", "grafana"}
"""Of the profile `observe`: one sends what the other shows, on this machine's own address."""


def test_whatever_is_not_the_gateway_is_on_the_inner_network_alone() -> None:
    assert FILE["networks"]["inner"] == {"internal": True}
    between = {name for name, service in SERVICES.items() if {"inner", "outer"} <= set(service["networks"])}
    assert between
    assert all("gateway" in name or name in SHOWN_TO_OPERATORS for name in between), between
    outside = {name for name, service in SERVICES.items() if "inner" not in service["networks"]}
    assert outside == FETCHES_MODELS


def test_no_inner_part_publishes_a_port() -> None:
    for part in ("redis", "engine", "router", "worker", "keys"):
        for name in [name for name in SERVICES if name.startswith(part)]:
            assert "ports" not in SERVICES[name], name


def test_whoever_holds_the_secret_of_users_is_a_gateway() -> None:
    holders = {name for name, service in SERVICES.items() if "MTA_SECRET" in service.get("environment", {})}
    assert holders == {name for name in SERVICES if "gateway" in name}


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
