"""`mta bank`: build and inspect a bank, import and export its adapters."""
