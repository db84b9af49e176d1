"""Which cores the threads of an engine's model keep to, each case in a process of its own."""

import os
import subprocess
import sys

import pytest

PLACES = """
import os, threading
from server.engine.cpu.executor import TASKS, bind_team, first_of_team
alike = os.sched_getaffinity(0)
bound = bind_team()
def places():
    return sorted(tuple(sorted(os.sched_getaffinity(int(task.name)))) for task in TASKS.iterdir())
kept = [place for place in places() if len(place) == 1]
with first_of_team(bound=bound):
    inside = os.sched_getaffinity(0)
print(bound, [core for (core,) in kept], sorted(inside), os.sched_getaffinity(0) == alike, sep=";")
"""

needs_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core leaves no choice")


def placed(threads: int) -> list[str]:
    """What `PLACES` prints with so many threads."""
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    ran = subprocess.run(
        [sys.executable, "-c", PLACES], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    return ran.stdout.strip().splitlines()[-1].split(";")


@needs_cores
def test_a_team_as_large_as_the_machine_has_a_core_for_each() -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert placed(len(cores)) == ["True", str(cores[1:]), str(cores[:1]), "True"]


@needs_cores
def test_a_smaller_team_is_left_to_the_kernel() -> None:
    cores = sorted(os.sched_getaffinity(0))
    assert placed(len(cores) - 1) == ["False", "[]", str(cores), "True"]
