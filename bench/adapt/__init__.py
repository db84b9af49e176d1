"""Cost of few-shot adaptation: `mta bench adapt`, and `python -m bench.adapt.beside`."""
