"""`mta up --replicas 2` for real: two engines that answer as one, and that keep what was promised when parts die."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.fleet.chaos.__main__ import Plan, under_load
from bench.fleet.chaos.faults import Fault
from bench.fleet.machine import ENGINES, Machine, tiny_machine
from bench.fleet.replicas import compared
from bench.fleet.ring import Ring
from bench.rig.tiny import WORLDS

PEOPLE = 20


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    with tiny_machine(tmp_path_factory.mktemp("fleet"), "--dtype", "float32") as started:
        yield started


def test_two_engines_answer_as_one_and_each_recipe_lives_on_one_of_them(machine: Machine) -> None:
    people = [
        {
            "user_id": f"replica-{n}",
            "profile": [WORLDS[n % 6], *(f"{WORLDS[(n + n // 6 + 1) % 6]}, {i}" for i in range(1 + n % 3))],
            "query": [{"input": f"What about {WORLDS[n % 5]}?"}, {"input": "And else?"}],
        }
        for n in range(PEOPLE)
    ]
    found = compared(machine.up, people, max_tokens=12)
    assert (found.answers, found.differing) == (2 * PEOPLE, [])
    assert len(found.recipes) > PEOPLE / 3
    assert not found.twice
    assert set.union(*found.resident.values()) >= found.recipes
    ring = Ring([f"http://{machine.up.address(name)}" for name in ENGINES])
    for number, name in enumerate(ENGINES):
        assert {ring.engine_of(recipe) for recipe in found.resident[name] & found.recipes} <= {number}


def test_what_was_promised_is_kept_when_engine_gateway_and_store_are_killed(machine: Machine, tmp_path: Path) -> None:
    faults = [Fault("valkey"), Fault("engine"), Fault("gateway")]
    claims = under_load(Plan(tmp_path, faults, seed=1, loses=0.001), machine)
    assert [claim.row for claim in claims if not claim.holds] == []
