"""Gain and cost of few-shot adaptation: `mta bench adapt`, and `python -m bench.adapt.users` and `.beside`."""
