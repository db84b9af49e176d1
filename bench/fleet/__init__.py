"""Benchmarks of several gateways and engines: capacity, overload, fairness, equal answers of two engines, faults,
rolling replacement under load, and simulated larger fleets."""
