"""How far it scales: `mta bench scale`, and what grows beside long streams: `python -m bench.scale.soak`."""
