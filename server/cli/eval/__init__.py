"""`mta eval`."""
