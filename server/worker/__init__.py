"""Few-shot adaptation: the process that trains user adapters."""
