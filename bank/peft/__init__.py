"""Import and export of adapters in PEFT's format."""
