"""A real run, watched: what is collected, and how it is drawn."""
