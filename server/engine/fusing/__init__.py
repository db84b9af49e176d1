"""Every worker: recipes become adapters in slots of vLLM, and only the rows that have one use it."""
