"""Is the fused adapter exactly what its recipe says? `python -m bench.oracle`."""
