"""Two engines behind a router on one machine: that they answer as one, that they stand when parts are shot, that parts
can be exchanged under load; and what many more would do, simulated."""
