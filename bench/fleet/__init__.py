"""Several gateways and engines at once: what they bear, and what happens when there is too much of it."""
