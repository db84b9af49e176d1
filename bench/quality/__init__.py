"""Does it help? `python -m bench.quality`, and beside it `bench.quality.engine` and `bench.quality.ratings`."""

from __future__ import annotations

from bank.evaluation.methods import default_methods
from bank.items.tasks import get_task


def methods_of(task: str) -> str:
    """The methods of docs/quality.md for a task, comma-separated."""
    return ",".join([*(method.name for method in default_methods(get_task(task).kind)), "merged:topic"])
