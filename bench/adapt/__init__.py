"""What few-shot adapting gains and costs: `python -m bench.adapt`, `bench.adapt.users`, `bench.adapt.beside`."""
