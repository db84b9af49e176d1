"""How far it scales: `mta bench scale`, and what grows beside a long stream: `python -m bench.scale.soak`."""
