"""Benchmarks, each a command: `python -m bench.NAME --help`. They need the extra `client` beside `cpu` or `gpu`."""
