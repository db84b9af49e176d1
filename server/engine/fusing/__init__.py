"""Every worker: recipes become adapters in vLLM's slots, applied only to the rows that have one."""
