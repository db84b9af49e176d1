"""`mta bank`: build a bank, look at it, take adapters in and out."""
