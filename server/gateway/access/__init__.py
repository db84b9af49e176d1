"""Who may ask, and how much: callers and their keys, limits, and the queue before the engine."""
