"""Benchmarks, each a command: `python -m bench.NAME --help`. They need the extra `client` besides `cpu` or `gpu`."""
