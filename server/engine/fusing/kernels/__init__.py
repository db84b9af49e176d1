"""LoRA on CPUs: one call for each layer, for the rows that have an adapter and for no others."""
