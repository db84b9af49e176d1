"""Shared tools of benchmarks and tests: tiny models, made-up people, and real processes."""
