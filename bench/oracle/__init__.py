"""Check that a fused adapter is exactly what its recipe says: `python -m bench.oracle`."""
