"""Does it help? `python -m bench.quality`, and beside it `bench.quality.engine` and `bench.quality.ratings`."""

from __future__ import annotations

from bank.evaluation.methods import DEFAULT

METHODS = f"{DEFAULT},merged:topic"
"""The methods of docs/quality.md, comma-separated."""
