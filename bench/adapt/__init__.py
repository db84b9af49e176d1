"""What few-shot adapting brings and costs: `python -m bench.adapt`, `bench.adapt.users`, `bench.adapt.beside`."""
