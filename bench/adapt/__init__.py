"""What few-shot adapting gains and costs: `mta bench adapt`, and `python -m bench.adapt.users`, `.beside`."""
