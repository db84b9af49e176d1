"""Several gateways and engines at once: what they bear, what happens when there is too much of it, that two engines
answer as one, that they stand when parts are shot, that parts can be exchanged under load; and larger fleets,
simulated."""
